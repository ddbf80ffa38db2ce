//! Where the redirect of a tool's own sign-in leads: a port on this guest's loopback, on which the tool listens. Whether
//! somebody has connected to it, and whether the tool still listens, is read from the kernel's table of sockets; the agent
//! does not look into the browser.
use std::{fs::File, io::Read as _, time::Duration};
use url::Url;

/// How often the table is read: a connection stays in it for a minute after its end (`TCP_TIMEWAIT_LEN`).
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(20);
/// So much of a table is read; a line has 150 bytes.
const TABLE_LIMIT: u64 = 1 << 20;

const LISTEN: &str = "0A";
const SYN_SENT: &str = "02";

/// The callback of one sign-in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Callback {
    pub(super) port: u16,
    /// Somebody has connected to it.
    reached: bool,
    listening: bool,
}

impl Callback {
    /// The callback that an authorization URL names; none where that is not a port of this guest.
    pub(super) fn of(url: &Url) -> Option<Self> {
        let (_, redirect) = url.query_pairs().find(|(name, _)| name == "redirect_uri")?;
        let redirect = Url::parse(&redirect).ok()?;
        let loopback = matches!(redirect.host_str()?, "localhost" | "127.0.0.1" | "[::1]");
        let port = redirect.port().filter(|_| loopback)?;
        Some(Self {
            port,
            reached: false,
            listening: true,
        })
    }

    /// Looks once more. A table that cannot be read says nothing.
    pub(super) fn look(&mut self) {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(table);
        if tables.iter().any(Option::is_some) {
            self.read(&tables.into_iter().flatten().collect::<String>());
        }
    }

    /// `sl local_address rem_address st …`, of either family.
    fn read(&mut self, sockets: &str) {
        self.listening = false;
        for line in sockets.lines() {
            let mut fields = line.split_whitespace().skip(1);
            let (Some(local), Some(remote), Some(state)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let ours = |address: &str| {
                let port = address.rsplit_once(':').map(|(_, port)| port);
                port.and_then(|port| u16::from_str_radix(port, 16).ok()) == Some(self.port)
            };
            match state {
                LISTEN => self.listening |= ours(local),
                // Not answered yet, and perhaps never.
                SYN_SENT => {}
                _ => self.reached |= ours(local) || ours(remote),
            }
        }
    }

    /// Whether nobody ever connected, and now nobody could: a redirect has failed, or would.
    pub(super) fn is_out_of_reach(&self) -> bool {
        !self.reached && !self.listening
    }
}

fn table(path: &str) -> Option<String> {
    let mut text = String::new();
    File::open(path)
        .ok()?
        .take(TABLE_LIMIT)
        .read_to_string(&mut text)
        .ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn callback(redirect: &str) -> Option<Callback> {
        let url =
            Url::parse_with_params("https://idp.test/authorize", [("redirect_uri", redirect)]);
        Callback::of(&url.unwrap())
    }

    #[test]
    fn only_a_port_of_this_guest_is_a_callback() {
        assert_eq!(
            callback("http://localhost:1455/auth/callback")
                .unwrap()
                .port,
            1455
        );
        assert_eq!(callback("http://[::1]:8080/").unwrap().port, 8080);
        for other in [
            "https://vendor.test:1455/cb",
            "http://localhost/cb",
            "urn:ietf:wg:oauth:2.0:oob",
        ] {
            assert_eq!(callback(other), None, "{other}");
        }
        assert_eq!(
            Callback::of(&Url::parse("https://idp.test/authorize").unwrap()),
            None
        );
    }

    #[test]
    fn the_kernels_table_tells_who_listens_and_who_came() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut quiet = callback(&format!("http://127.0.0.1:{port}/cb")).unwrap();
        quiet.look();
        assert!(quiet.listening && !quiet.reached && !quiet.is_out_of_reach());
        let mut reached = quiet.clone();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        reached.look();
        assert!(reached.reached);
        drop((client, listener));
        reached.look();
        assert!(!reached.listening && !reached.is_out_of_reach());
        // A port on which nobody listened, and to which nobody came.
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut gone = callback(&format!("http://localhost:{free}/cb")).unwrap();
        assert!(TcpStream::connect(("127.0.0.1", free)).is_err());
        gone.look();
        assert!(gone.is_out_of_reach());
    }
}
