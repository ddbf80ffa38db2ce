//! What a guest can reach: nothing but what the way out allows. Asked from inside a VM, in the proxy's own protocol, so
//! that no client in the guest can be more careful than an attacker would be.
use super::{alone, guest::Guest, took};
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpListener, process::Command};
use vestibule_api::{
    agent::ExecUser,
    egress::{EgressMode, EgressPolicy, EgressReason, Pin},
    machine::RunnerEventKind,
};
use vestibule_testkit::{
    process::Process,
    stage::{image_home, residue},
    wait,
};

/// Prints the status line and `Location:` of what the proxy answers to the request head in `$1`.
const ASK: &str = r#"exec 3<>/dev/tcp/127.0.0.1/3128; printf '%b' "$1" >&3; timeout 30 head -c 2000 <&3 | tr -d '\r' | sed -n '1p;/^[Ll]ocation:/p;/^$/q'"#;

impl Guest {
    /// The status that the proxy answers to a request for this, and where it redirects to.
    async fn ask(&self, head: &str) -> Result<(u16, Option<String>)> {
        let head = format!("{head} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n");
        let said = self.run(ExecUser::Person, ASK, &head).await?;
        let mut lines = said.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .and_then(|code| code.parse().ok());
        let location = lines
            .next()
            .and_then(|line| line.split_once(": "))
            .map(|(_, to)| to.to_owned());
        Ok((
            status.with_context(|| format!("`{head}` got `{said}`"))?,
            location,
        ))
    }
}

/// A host as everyone writes it: addresses in their canonical form, without brackets.
fn plain(host: &str) -> String {
    let bare = host.trim_matches(['[', ']']);
    bare.parse::<IpAddr>()
        .map_or_else(|_| bare.to_owned(), |address| address.to_string())
}

/// Everything that must be refused, with the reason that the event must give.
fn forbidden(listening: u16) -> Vec<(String, u16, EgressReason)> {
    use EgressReason::{LinkLocal, Loopback, NotGlobal, Private};
    let mut all = Vec::new();
    for (host, reason) in [
        ("127.0.0.1", Loopback),
        ("127.9.9.9", Loopback),
        ("localhost", Loopback),
        ("[::1]", Loopback),
        ("[::ffff:127.0.0.1]", Loopback),
        ("[::ffff:7f00:1]", Loopback),
    ] {
        all.push((host.to_owned(), listening, reason));
    }
    for (host, reason) in [
        ("169.254.169.254", LinkLocal),
        ("[::ffff:169.254.169.254]", LinkLocal),
        ("[fe80::1]", LinkLocal),
        ("10.0.0.1", Private),
        ("172.16.0.1", Private),
        ("172.31.255.254", Private),
        ("192.168.1.1", Private),
        ("100.64.0.1", Private),
        ("[fd00::1]", Private),
        ("[::ffff:10.0.0.1]", Private),
        ("[fd00:ec2::254]", Private),
        ("0.0.0.0", NotGlobal),
        ("[::]", NotGlobal),
        ("224.0.0.1", NotGlobal),
        ("[ff02::1]", NotGlobal),
        ("255.255.255.255", NotGlobal),
        ("192.0.2.1", NotGlobal),
        // What every VM calls itself: there is no address by which another one could be meant.
        ("192.0.2.2", NotGlobal),
        ("[2001:db8::1]", NotGlobal),
        ("240.0.0.1", NotGlobal),
    ] {
        all.push((host.to_owned(), 80, reason));
    }
    all
}

/// Public names whose owner says that they are somewhere inside.
const LYING: [(&str, &[&str], EgressReason); 7] = [
    ("loopback.lies.test", &["127.0.0.1"], EgressReason::Loopback),
    ("six.lies.test", &["::1"], EgressReason::Loopback),
    (
        "mapped.lies.test",
        &["::ffff:127.0.0.1"],
        EgressReason::Loopback,
    ),
    (
        "metadata.lies.test",
        &["169.254.169.254"],
        EgressReason::LinkLocal,
    ),
    ("private.lies.test", &["10.0.0.1"], EgressReason::Private),
    ("unique.lies.test", &["fd00::1"], EgressReason::Private),
    (
        "both.lies.test",
        &["10.0.0.1", "192.168.1.1"],
        EgressReason::Private,
    ),
];

/// A name server that lies, and a `resolv.conf` that asks it.
struct Names {
    resolvers: Utf8PathBuf,
    _server: Process,
}

impl Names {
    async fn serve(dir: &Utf8Path) -> Result<Self> {
        // resolv.conf(5) knows no ports, and the whole of 127/8 is loopback.
        const ADDRESS: &str = "127.53.53.53";
        let resolvers = dir.join("resolv.conf");
        std::fs::write(&resolvers, format!("nameserver {ADDRESS}\n"))?;
        let mut command = Command::new("dnsmasq");
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-hosts",
            "--no-resolv",
            "--bind-interfaces",
            "--pid-file",
            "--user=root",
        ]);
        command.arg(format!("--listen-address={ADDRESS}"));
        for (name, addresses, _) in LYING {
            command.arg(format!("--host-record={name},{}", addresses.join(",")));
        }
        let server = Process::start("dnsmasq", command, &dir.join("dnsmasq.log"))?;
        wait::until("the name server", Duration::from_secs(20), || async {
            let asked = tokio::net::TcpStream::connect((ADDRESS, 53)).await;
            asked.map(drop).map_err(|err| err.to_string())
        })
        .await?;
        Ok(Self {
            resolvers,
            _server: server,
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test egress"]
async fn a_guest_reaches_nothing_that_it_must_not() -> Result<()> {
    let _alone = alone().await;
    let begin = Instant::now();
    let home = camino_tempfile::tempdir()?;
    // A service on the host's loopback that must never see a guest, and one that the operator allows by a pin.
    let secret = TcpListener::bind("127.0.0.1:0").await?;
    let listening = secret.local_addr()?.port();
    let allowed = TcpListener::bind("127.0.0.1:0").await?;
    let pin = Pin {
        host: "allowed.test".into(),
        port: Some(80),
        to: allowed.local_addr()?,
    };
    let location = format!("http://127.0.0.1:{listening}/");
    let answer = format!(
        "HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    let serving = tokio::spawn(async move {
        while let Ok((mut tcp, _)) = allowed.accept().await {
            let mut head = [0; 1024];
            tokio::io::AsyncReadExt::read(&mut tcp, &mut head)
                .await
                .ok();
            tcp.write_all(answer.as_bytes()).await.ok();
            tcp.shutdown().await.ok();
        }
    });
    let policy = EgressPolicy {
        mode: EgressMode::Open,
        pins: vec![pin],
        ..EgressPolicy::default()
    };
    let image = image_home()
        .join("aliases/tiny")
        .canonicalize_utf8()
        .context("no image `tiny`: `script/test images` builds it")?;
    let mut spec = Guest::spec(home.path(), &image)?;
    spec.memory_mib = 384;
    spec.egress = policy;
    let names = Names::serve(home.path()).await?;
    let guest = Guest::start_where(&spec, &names.resolvers).await?;
    took("tiny up", begin);

    let mut expected: BTreeMap<(String, u16), EgressReason> = BTreeMap::new();
    let lying = LYING.iter().map(|(name, _, reason)| {
        let port = if *reason == EgressReason::Loopback {
            listening
        } else {
            80
        };
        ((*name).to_owned(), port, *reason)
    });
    for (host, port, reason) in forbidden(listening).into_iter().chain(lying) {
        for head in [
            format!("CONNECT {host}:{port}"),
            format!("GET http://{host}:{port}/"),
        ] {
            let (status, _) = guest.ask(&head).await?;
            ensure!(
                (400..600).contains(&status),
                "`{head}` was answered with {status}"
            );
        }
        expected.insert((plain(&host), port), reason);
    }
    // A redirect to the host's loopback: the first request is allowed, following it is not.
    let (status, to) = guest.ask("GET http://allowed.test/").await?;
    assert_eq!((status, to.as_deref()), (302, Some(location.as_str())));
    let (status, _) = guest.ask(&format!("GET {location}")).await?;
    assert!(status >= 400, "the redirect was followed: {status}");
    // The pin is for port 80 only.
    assert!(guest.ask("CONNECT allowed.test:443").await?.0 >= 400);

    // No other way: no interface but loopback and the dummy, and the runner's socket is not there.
    let devices = guest
        .run(
            ExecUser::Root,
            "cat /proc/net/dev | tail -n +3 | cut -d: -f1",
            "",
        )
        .await?;
    let devices: Vec<&str> = devices
        .split_whitespace()
        .filter(|d| !matches!(*d, "lo" | "dummy0"))
        .collect();
    assert!(devices.is_empty(), "the guest has {devices:?}");
    let socket = home.path().join("vm/runner.sock");
    let there = guest
        .run(
            ExecUser::Root,
            "test -e \"$1\" && echo there",
            socket.as_str(),
        )
        .await?;
    assert_eq!(there, "");

    let events = guest.end().await?;
    for ((host, port), reason) in expected {
        let said = events.iter().any(|line| {
            matches!(&line.event, RunnerEventKind::Egress { host: h, port: p, reason: r, .. }
                if plain(h) == host && *p == port && *r == reason)
        });
        ensure!(
            said,
            "no event says that {host}:{port} was refused as {reason:?}"
        );
    }
    ensure!(
        tokio::time::timeout(Duration::from_millis(100), secret.accept())
            .await
            .is_err(),
        "somebody connected to the host's loopback"
    );
    serving.abort();
    assert_eq!(residue(&home.path().join("vm"), None), Vec::<String>::new());
    took("egress in all", begin);
    Ok(())
}
