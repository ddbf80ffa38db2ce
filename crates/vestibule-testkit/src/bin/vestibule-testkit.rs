//! The testkit's servers as processes, for scripts. Each prints one line of JSON when it listens and runs until it gets
//! SIGTERM or SIGINT.
use anyhow::{Context, Result, bail};
use camino::Utf8PathBuf;
use hyper::Method;
use std::{io::Write as _, time::Duration};
use tokio::sync::mpsc;
use vestibule_api::{control::LoginCodeReply, machine::DriverChoice};
use vestibule_testkit::{
    ca::TestCa,
    conformance,
    idp::{self, Idp},
    nested::HeldVm,
    runner,
    scan::Scan,
    stage::{Setting, Stage, binary, residue},
    vendor::{HOSTS, Vendor},
};

const USAGE: &str = "vestibule-testkit ca --ca DIR
vestibule-testkit vendor --ca DIR [--https ADDR] [--http ADDR]
                         [--config FILE]       grants by itself; FILE is what `image verify --sign-in` takes
vestibule-testkit idp
vestibule-testkit stage --image ALIAS          a controller with a home of its own, its tools signing in at an idp; each line
                                               of standard input kills it, and the next one is there when one line more is out
vestibule-testkit conformance --driver DRIVER --image DIR --home DIR [--jail required]
                                               what a VM is, by `vestibule` ($VESTIBULE_BIN); `required`: a case about the
                                               jail that finds none fails
vestibule-testkit overhead --image DIR --home DIR   what `bench overhead` runs in the nested machine
vestibule-testkit residue --home DIR --except PID
vestibule-testkit scan --home DIR --pid PID    where words (a JSON object on standard input, by name) are that a sign-in left
vestibule-testkit runner [--boot-ms N] [--sign-in-ms N] [--hand-over-ms N]
                                               a runner without a VM; 0 for --sign-in-ms: its person never signs in
vestibule-testkit runner --crowd SOCKET        one of a bench's, which lives there";

#[tokio::main]
async fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    if matches!(command.as_str(), "bench" | "pour") {
        // Whoever ends a bench ends what it started with it: a machine that nobody waits for makes the next figures wrong.
        return tokio::select! {
            done = vestibule_testkit::bench::cli::main(&command, words) => done,
            stopped = ended() => stopped.and_then(|()| anyhow::bail!("stopped by a signal")),
        };
    }
    let options: std::collections::BTreeMap<String, String> = pairs(words)?;
    let option = |name: &str| options.get(name).cloned();
    let ca = || -> Result<TestCa> {
        let dir = option("ca").context("`--ca DIR` is missing")?;
        TestCa::in_dir(&Utf8PathBuf::from(dir))
    };
    match command.as_str() {
        "ca" => say(&serde_json::json!({ "ca": ca()?.path() })),
        "vendor" => {
            let ca = ca()?;
            let any = || "127.0.0.1:0".to_owned();
            let https = option("https").unwrap_or_else(any);
            let http = option("http").unwrap_or_else(any);
            let vendor = Vendor::start_on(&ca, &https, &http).await?;
            if let Some(config) = option("config") {
                vendor.grant_unattended();
                let setting = Setting::image("browser-test").vendor(&vendor, &ca);
                std::fs::write(&config, setting.toml())
                    .with_context(|| format!("write the configuration `{config}`"))?;
            }
            say(&serde_json::json!({
                "https": vendor.https(), "http": vendor.http(), "ca": ca.path(), "hosts": HOSTS,
            }))?;
            ended().await
        }
        "idp" => {
            let idp = Idp::start().await?;
            say(
                &serde_json::json!({ "issuer": idp.issuer(), "address": idp.address(), "control": idp.control_url() }),
            )?;
            ended().await
        }
        "stage" => {
            let idp = Idp::start().await?;
            let image = option("image").context("`--image ALIAS` is missing")?;
            let mut stage = Stage::start(&Setting::image(&image).idp(&idp)).await?;
            let login: LoginCodeReply = stage
                .api()
                .call(Method::POST, "/api/login-codes", None::<&()>)
                .await?;
            say(&serde_json::json!({
                "link": login.link, "home": stage.home(), "pid": stage.pid(), "program": binary()?,
                "issuer": idp.issuer(), "control": idp.control_url(), "client": idp::CLIENT,
                "login": idp::LOGIN, "password": idp.password(),
            }))?;
            let mut lines = lines();
            let over = ended();
            tokio::pin!(over);
            loop {
                tokio::select! {
                    ended = &mut over => {
                        ended?;
                        return stage.end().await;
                    }
                    Some(_) = lines.recv() => {
                        stage = stage.crash_and_return().await?;
                        say(&serde_json::json!({ "pid": stage.pid() }))?;
                    }
                }
            }
        }
        "runner" => {
            if let Some(crowd) = option("crowd") {
                return runner::crowd::join(&Utf8PathBuf::from(crowd));
            }
            let millis = |name: &str, default: u64| -> Result<Duration> {
                let given = option(name).map(|given| given.parse()).transpose();
                let given = given.with_context(|| format!("understand `--{name}`"))?;
                Ok(Duration::from_millis(given.unwrap_or(default)))
            };
            let sign_in = millis("sign-in-ms", 20)?;
            runner::run(runner::Pace {
                boot: millis("boot-ms", 20)?,
                sign_in: Some(sign_in).filter(|sign_in| !sign_in.is_zero()),
                hand_over: millis("hand-over-ms", 0)?,
            })
            .await
        }
        "scan" => {
            let home = option("home").context("`--home DIR` is missing")?;
            let pid = option("pid").and_then(|pid| pid.parse().ok());
            let words = serde_json::from_reader(std::io::stdin()).context("read the words")?;
            say(&serde_json::json!(
                Scan::new(&words)?.everywhere(&Utf8PathBuf::from(home), pid)?
            ))
        }
        "conformance" => {
            let given = |name: &str| option(name).with_context(|| format!("`--{name}` is missing"));
            let driver: DriverChoice = given("driver")?.parse()?;
            let held = (driver == DriverChoice::Firecracker).then(HeldVm::make);
            let _held = held.transpose()?;
            conformance::run(conformance::Setup {
                program: binary()?,
                driver,
                image: Utf8PathBuf::from(given("image")?).canonicalize_utf8()?,
                home: given("home")?.into(),
                jail_required: option("jail").as_deref() == Some("required"),
            })
            .await
        }
        "overhead" => {
            let given = |name: &str| option(name).with_context(|| format!("`--{name}` is missing"));
            let _held = HeldVm::make()?;
            vestibule_testkit::bench::overhead::samples(
                Utf8PathBuf::from(given("image")?).canonicalize_utf8()?,
                given("home")?.into(),
            )
            .await
        }
        "residue" => {
            let home = option("home").context("`--home DIR` is missing")?;
            let except = option("except").and_then(|pid| pid.parse().ok());
            say(&serde_json::json!(residue(
                &Utf8PathBuf::from(home),
                except
            )))
        }
        _ => bail!("usage:\n{USAGE}\n{}", vestibule_testkit::bench::cli::USAGE),
    }
}

fn pairs(
    mut words: impl Iterator<Item = String>,
) -> Result<std::collections::BTreeMap<String, String>> {
    let mut pairs = std::collections::BTreeMap::new();
    while let Some(word) = words.next() {
        let name = word
            .strip_prefix("--")
            .with_context(|| format!("`{word}` is no option\n{USAGE}"))?;
        let value = words
            .next()
            .with_context(|| format!("`--{name}` has no value"))?;
        pairs.insert(name.to_owned(), value);
    }
    Ok(pairs)
}

fn say(value: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")
        .and_then(|()| out.flush())
        .context("print where it listens")
}

/// Lines of standard input, read by a thread that nobody waits for at the end.
fn lines() -> mpsc::UnboundedReceiver<String> {
    let (send, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            // Nobody listens at the end.
            if send.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

async fn ended() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}
