//! Many copies of one VM, one after another and at once: each is another one in everything that could tell two of them
//! apart or let one be guessed from another. An image with a browser has to be `browser-test`, which trusts the authority
//! in `VESTIBULE_TEST_CA`.
use crate::{
    guest::{exec, manifest_of, run_in},
    inherited,
    snapshot::{clock_error_ms, digest, golden_within, identity, restored},
    support::{Place, Running},
};
use futures_util::future::{OptionFuture, join_all};
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use vestibule_api::{
    agent::ExecUser,
    egress::{EgressMode, EgressPolicy, Pin},
    machine::{MachineState, RestoreSpec},
};
use vestibule_testkit::ca::TestCa;

const HOST: &str = "copies.test";
/// Copies one after another, and at once. With a browser there are fewer, for it is two cores that all of them load a page
/// on; `VESTIBULE_TEST_COPIES` says how many one after another, and then as many as of a small one are there at once.
const ALONE: usize = 100;
const ALONE_WITH_BROWSER: usize = 2;
const AT_ONCE: usize = 8;
const AT_ONCE_WITH_BROWSER: usize = 3;
/// Chromium's second start, which hands the page over, and the page's own loading take 10 s on a quiet machine; eight at once
/// on two cores take minutes.
const OPEN_S: u32 = 400;
const PAGE: Duration = Duration::from_secs(600);

/// Says what it finds before it leaves anything, and is followed by a cookie (see [`answer`]).
const SCRIPT: &str = "<!doctype html><title>copies</title><script>
const left = [document.cookie, localStorage.planted, sessionStorage.planted].filter(Boolean);
localStorage.planted = sessionStorage.planted = 'here';
fetch(location.pathname, {method: 'POST', body: JSON.stringify({ left,
  bytes: Array.from(crypto.getRandomValues(new Uint8Array(32))),
  uuid: crypto.randomUUID(), math: [Math.random(), Math.random(), Math.random(), Math.random()]})})
</script>";

/// What a page drew.
#[derive(Clone, Debug, Deserialize)]
struct Drawn {
    bytes: Vec<u8>,
    uuid: String,
    math: Vec<f64>,
    /// What the page found of an earlier one: cookies that it may read, and its storage.
    left: Vec<String>,
    /// The browser's cookies that came with it.
    #[serde(skip)]
    cookies: Option<String>,
}

/// A site over TLS that was set up a minute ago: what its pages drew, and what its clients said first.
struct Site {
    address: SocketAddr,
    drawn: Arc<Mutex<BTreeMap<String, Drawn>>>,
    /// Requests for pages by browsers that had cookies.
    early: Arc<Mutex<Vec<String>>>,
    /// `ClientHello.random` of each connection (RFC 8446, section 4.1.2).
    randoms: Arc<Mutex<Vec<[u8; 32]>>>,
}

impl Site {
    async fn open() -> Self {
        let authority =
            std::env::var("VESTIBULE_TEST_CA").expect("VESTIBULE_TEST_CA names a directory");
        let authority = TestCa::in_dir(authority.as_str().into()).unwrap();
        let server = authority
            .server_since(&[HOST], Duration::from_secs(60))
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let site = Self {
            address: listener.local_addr().unwrap(),
            drawn: Arc::default(),
            early: Arc::default(),
            randoms: Arc::default(),
        };
        let (drawn, randoms) = (Arc::clone(&site.drawn), Arc::clone(&site.randoms));
        let early = Arc::clone(&site.early);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (drawn, randoms) = (Arc::clone(&drawn), Arc::clone(&randoms));
                let early = Arc::clone(&early);
                let acceptor = TlsAcceptor::from(Arc::clone(&server));
                tokio::spawn(async move {
                    if let Some(random) = client_random(&stream).await {
                        randoms.lock().unwrap().push(random);
                    }
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let answer = service_fn(move |request| {
                        answer(request, Arc::clone(&drawn), Arc::clone(&early))
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        site
    }

    fn policy(&self) -> EgressPolicy {
        EgressPolicy {
            mode: EgressMode::AllowList,
            hosts: vec![HOST.to_owned()],
            pins: vec![Pin {
                host: HOST.to_owned(),
                port: None,
                to: self.address,
            }],
            ..EgressPolicy::default()
        }
    }

    /// A person's terminal opens the page in the browser that runs.
    async fn visited_by(&self, runner: &Running, name: &str) -> Drawn {
        let begun = Instant::now();
        let open = format!(
            "HOME=/home/person exec /usr/lib/chromium/chromium --user-data-dir=/home/person/.config/chromium https://{HOST}/{name}"
        );
        let reply = run_in(runner, ExecUser::Person, &open, OPEN_S).await;
        assert!(
            reply.stdout.contains("existing browser session"),
            "{reply:?}"
        );
        loop {
            if let Some(drawn) = self.drawn.lock().unwrap().get(name) {
                println!(
                    "{name}: a page after {:.1} s",
                    begun.elapsed().as_secs_f64()
                );
                return drawn.clone();
            }
            assert!(begun.elapsed() < PAGE, "the page of {name} never answered");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The first record is a handshake's, its message a `ClientHello`: the random is behind 5 + 4 + 2 bytes.
async fn client_random(stream: &TcpStream) -> Option<[u8; 32]> {
    let mut head = [0; 43];
    while stream.peek(&mut head).await.ok()? < head.len() {
        stream.readable().await.ok()?;
        tokio::task::yield_now().await;
    }
    assert_eq!((head[0], head[5]), (22, 1), "a ClientHello");
    head[11..].try_into().ok()
}

async fn answer(
    request: Request<Incoming>,
    drawn: Arc<Mutex<BTreeMap<String, Drawn>>>,
    early: Arc<Mutex<Vec<String>>>,
) -> Result<Response<Full<&'static [u8]>>, Infallible> {
    let name = request.uri().path().trim_start_matches('/').to_owned();
    let cookies = request.headers().get("cookie");
    let cookies = cookies.map(|cookies| String::from_utf8_lossy(cookies.as_bytes()).into_owned());
    let mut status = StatusCode::OK;
    if *request.method() == Method::POST {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut said: Drawn = serde_json::from_slice(&body).unwrap();
        said.cookies = cookies;
        drawn.lock().unwrap().insert(name, said);
    } else if name == "favicon.ico" {
        status = StatusCode::NOT_FOUND;
    } else if let Some(cookies) = cookies {
        early.lock().unwrap().push(format!("{name}: {cookies}"));
    }
    let page = Response::builder()
        .status(status)
        .header("content-type", "text/html")
        .header("cache-control", "max-age=3600")
        .header("set-cookie", "planted=here; Max-Age=3600; Secure; HttpOnly");
    Ok(page.body(Full::new(SCRIPT.as_bytes())).unwrap())
}

/// Everything that was seen of all copies so far.
#[derive(Default)]
struct Seen(BTreeSet<String>);

impl Seen {
    fn add(&mut self, what: impl Into<String>) {
        let what = what.into();
        assert!(!self.0.contains(&what), "twice: {what}");
        self.0.insert(what);
    }
}

struct Copies {
    from: RestoreSpec,
    site: Option<Site>,
    seen: Mutex<Seen>,
}

impl Copies {
    /// One copy, compared with all before it; how long until it was up.
    async fn begin(&self) -> (Copied, Duration) {
        let mut place = restored(&self.from);
        place.spec.boot_deadline_s = 600;
        if let Some(site) = &self.site {
            place.spec.egress = site.policy();
        }
        let begun = Instant::now();
        let runner = place.start().await;
        runner.state(MachineState::Up).await;
        let up = begun.elapsed();
        let error = clock_error_ms(&runner).await;
        assert!(error < 100.0, "the clock is off by {error} ms");
        let identity = identity(&runner).await;
        {
            let mut seen = self.seen.lock().unwrap();
            for (name, line) in ["machine-id", "hostname", "", "boot id", "urandom", ""]
                .into_iter()
                .zip(identity)
            {
                if !name.is_empty() {
                    seen.add(format!("{name} {line}"));
                }
            }
        }
        if let Some(site) = &self.site {
            let drawn = site
                .visited_by(&runner, &place.spec.machine_id.to_string())
                .await;
            assert_eq!((drawn.bytes.len(), drawn.math.len()), (32, 4));
            assert_eq!(drawn.left, Vec::<String>::new(), "the page found it");
            assert_eq!(*site.early.lock().unwrap(), Vec::<String>::new());
            assert_eq!(drawn.cookies.as_deref(), Some("planted=here"));
            let mut seen = self.seen.lock().unwrap();
            seen.add(format!("bytes {:?}", drawn.bytes));
            seen.add(format!("uuid {}", drawn.uuid));
            for number in drawn.math {
                seen.add(format!("Math.random {number}"));
            }
        }
        let copied = Copied { runner, place, up };
        (copied, up)
    }

    /// One copy's whole life; how long until it was up.
    async fn live(&self) -> Duration {
        let (copied, up) = self.begin().await;
        copied.end().await;
        up
    }
}

/// A copy that lives, and where.
struct Copied {
    runner: Running,
    place: Place,
    up: Duration,
}

/// A copy that took longer than this says where it was meanwhile.
const SLOW: Duration = Duration::from_secs(10);

impl Copied {
    /// Ends; `looked_at`: after everything was found in it that the site has left there.
    async fn end_used(self, looked_at: bool) {
        if looked_at {
            inherited::finds_what_was_planted(&self.runner, HOST).await;
        }
        self.end().await;
    }

    async fn end(self) {
        let slow = self.up > SLOW;
        if slow {
            let ask =
                "journalctl -o short-monotonic --no-pager | tail -n 100; cat /proc/interrupts";
            println!("{}", exec(&self.runner, ask).await.stdout);
        }
        self.runner.stop().await;
        self.runner.ended().await;
        if slow {
            println!("up after {:?}:", self.up);
            for event in self.place.events() {
                println!("{event:?}");
            }
            println!("{}", self.place.evidence("serial.log"));
        }
    }
}

fn figures(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100].as_secs_f64();
    println!(
        "{what}: {} copies, up after {:.2} s (median), {:.2} (90 %), {:.2} (all)",
        took.len(),
        at(50),
        at(90),
        at(100)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real image: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn many_copies_have_nothing_in_common() {
    let with_browser = manifest_of().features.iter().any(|f| f == "browser");
    let home = camino_tempfile::tempdir().unwrap();
    let copies = Copies {
        from: golden_within(home.path(), 600).await,
        site: if with_browser {
            Some(Site::open().await)
        } else {
            None
        },
        seen: Mutex::default(),
    };
    let before = digest(&copies.from);
    let (alone, at_once) = match std::env::var("VESTIBULE_TEST_COPIES") {
        Ok(number) => (number.parse().unwrap(), AT_ONCE),
        Err(_) if with_browser => (ALONE_WITH_BROWSER, AT_ONCE_WITH_BROWSER),
        Err(_) => (ALONE, AT_ONCE),
    };
    let (mut took, mut last) = (Vec::new(), None);
    for _ in 0..alone {
        // While one ends the next begins.
        let first = with_browser && took.len() == 1;
        let ended = OptionFuture::from(last.take().map(|copied: Copied| copied.end_used(first)));
        let ((copied, up), _) = tokio::join!(copies.begin(), ended);
        took.push(up);
        last = Some(copied);
    }
    OptionFuture::from(last.map(Copied::end)).await;
    figures("one after another", took);
    let lives = (0..at_once).map(|_| copies.live());
    figures("at once", join_all(lives).await);
    if let Some(site) = &copies.site {
        let randoms = site.randoms.lock().unwrap();
        let distinct: BTreeSet<_> = randoms.iter().collect();
        assert!(randoms.len() >= alone + at_once, "{}", randoms.len());
        assert_eq!(distinct.len(), randoms.len(), "a TLS client random twice");
        println!("{} TLS client randoms, all distinct", randoms.len());
    }
    assert_eq!(
        digest(&copies.from),
        before,
        "a copy wrote to the shared memory"
    );
}
