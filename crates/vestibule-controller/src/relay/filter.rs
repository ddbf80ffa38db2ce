//! What a viewer without control may say: the client's half of RFB (RFC 6143), parsed, and input left out.
//!
//! Kept: the handshake, SetPixelFormat, SetEncodings, FramebufferUpdateRequest, and of the extensions that noVNC uses
//! EnableContinuousUpdates and ClientFence. Left out: keys, pointer, clipboard, SetDesktopSize, QEMU and xvp messages.
//! Anything else is not the protocol.
#[cfg(test)]
mod oracle;

use std::ops::Range;

/// A message longer than this is no message: the largest that is kept is SetEncodings with 65,535 encodings.
const CLIPBOARD_LIMIT: u32 = 64 << 20;

/// The bytes are not the client's half of RFB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not RFB: {0}")]
pub(crate) struct NotRfb(&'static str);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Version,
    Security,
    Init,
    Messages,
}

/// What follows at the head of the buffer.
enum Next {
    /// So many bytes, kept or left out, can be taken as they come.
    Body { len: usize, keep: bool },
    /// A header is not complete.
    More,
}

/// The filter of one connection.
#[derive(Debug)]
pub(crate) struct ViewOnly {
    phase: Phase,
    /// The beginning of a message whose length is not known yet: never more than a header.
    head: Vec<u8>,
    /// Bytes of the message under way that are still to come.
    rest: usize,
    keep: bool,
}

impl ViewOnly {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Version,
            head: Vec::with_capacity(16),
            rest: 0,
            keep: false,
        }
    }

    /// Appends to `out` what of `bytes` may pass.
    ///
    /// # Errors
    /// When the bytes are not RFB; nothing of the message under way has passed then.
    pub(crate) fn pass(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), NotRfb> {
        loop {
            let now = self.rest.min(bytes.len());
            let (body, after) = bytes.split_at(now);
            if self.keep {
                out.extend_from_slice(body);
            }
            self.rest -= now;
            bytes = after;
            if self.rest > 0 {
                return Ok(());
            }
            let Some((first, after)) = bytes.split_first() else {
                return Ok(());
            };
            self.head.push(*first);
            bytes = after;
            match self.next()? {
                Next::More => {}
                Next::Body { len, keep } => {
                    if keep {
                        out.extend_from_slice(&self.head);
                    }
                    self.rest = len.saturating_sub(self.head.len());
                    self.keep = keep;
                    self.head.clear();
                }
            }
        }
    }

    fn next(&mut self) -> Result<Next, NotRfb> {
        match self.phase {
            Phase::Version => self.version(),
            Phase::Security => self.security(),
            Phase::Init => {
                // ClientInit's shared flag: a viewer that asks to be alone would end the others.
                self.head = vec![1];
                self.phase = Phase::Messages;
                Ok(Next::Body { len: 1, keep: true })
            }
            Phase::Messages => self.message(),
        }
    }

    /// ProtocolVersion, section 7.1.1.
    fn version(&mut self) -> Result<Next, NotRfb> {
        if self.head.len() < 12 {
            return Ok(Next::More);
        }
        self.phase = match self.head.as_slice() {
            b"RFB 003.008\n" | b"RFB 003.007\n" => Phase::Security,
            b"RFB 003.003\n" => Phase::Init,
            _ => return Err(NotRfb("the version is none of 3.3, 3.7, 3.8")),
        };
        Ok(Next::Body {
            len: 12,
            keep: true,
        })
    }

    /// The security type that the client chose, section 7.1.2. The guest offers None: only host and agent hold its socket.
    fn security(&mut self) -> Result<Next, NotRfb> {
        if self.head != [1] {
            return Err(NotRfb("the security type is not None"));
        }
        self.phase = Phase::Init;
        Ok(Next::Body { len: 1, keep: true })
    }

    /// A client-to-server message, section 7.5, and the community's list of extensions.
    fn message(&self) -> Result<Next, NotRfb> {
        let kept = |len| Ok(Next::Body { len, keep: true });
        let dropped = |len| Ok(Next::Body { len, keep: false });
        let Some(kind) = self.head.first() else {
            return Ok(Next::More);
        };
        match kind {
            0 => kept(20),
            2 => self.counted(2..4, |count| Next::Body {
                len: 4 + 4 * count,
                keep: true,
            }),
            3 => kept(10),
            4 => dropped(8),
            5 => dropped(6),
            6 => self.clipboard(),
            150 => kept(10),
            248 => self.counted(8..9, |count| Next::Body {
                len: 9 + count,
                keep: true,
            }),
            250 => dropped(4),
            251 => self.counted(6..7, |count| Next::Body {
                len: 8 + 16 * count,
                keep: false,
            }),
            255 => self.qemu(),
            _ => Err(NotRfb("the message type is none of a client's")),
        }
    }

    /// A message whose length follows from the big-endian number in `at`.
    fn counted(&self, at: Range<usize>, next: impl Fn(usize) -> Next) -> Result<Next, NotRfb> {
        let Some(bytes) = self.head.get(at) else {
            return Ok(Next::More);
        };
        Ok(next(
            bytes
                .iter()
                .fold(0, |number, byte| number << 8 | usize::from(*byte)),
        ))
    }

    /// ClientCutText; with the extended clipboard the length is negative and its magnitude counts.
    fn clipboard(&self) -> Result<Next, NotRfb> {
        let Some(Ok(length)) = self.head.get(4..8).map(<[u8; 4]>::try_from) else {
            return Ok(Next::More);
        };
        let length = i32::from_be_bytes(length).unsigned_abs();
        if length > CLIPBOARD_LIMIT {
            return Err(NotRfb("the clipboard is too large"));
        }
        let length = usize::try_from(length).map_err(|_| NotRfb("the clipboard is too large"))?;
        Ok(Next::Body {
            len: 8 + length,
            keep: false,
        })
    }

    /// QEMU's messages: the extended key event, and audio.
    fn qemu(&self) -> Result<Next, NotRfb> {
        match (self.head.get(1), self.head.get(2..4)) {
            (None, _) | (Some(1), None) => Ok(Next::More),
            (Some(0), _) => Ok(Next::Body {
                len: 12,
                keep: false,
            }),
            (Some(1), Some([0, 2])) => Ok(Next::Body {
                len: 10,
                keep: false,
            }),
            (Some(1), Some(_)) => Ok(Next::Body {
                len: 4,
                keep: false,
            }),
            (Some(_), _) => Err(NotRfb("the QEMU message is none of a client's")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{oracle::more_than_looking, *};
    use proptest::prelude::*;

    const HELLO: &[u8] = b"RFB 003.008\n\x01\x00";
    const HELLO_SHARED: &[u8] = b"RFB 003.008\n\x01\x01";

    /// One of each message, and whether it is kept.
    fn messages() -> Vec<(Vec<u8>, bool)> {
        let with = |head: &[u8], body: usize| [head, &vec![7; body]].concat();
        vec![
            (with(&[0], 19), true),
            (with(&[2, 0, 0, 3], 12), true),
            (with(&[2, 0, 0, 0], 0), true),
            (with(&[3], 9), true),
            (with(&[4], 7), false),
            (with(&[5], 5), false),
            (with(&[6, 0, 0, 0, 0, 0, 0, 5], 5), false),
            (with(&[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xf8], 8), false),
            (with(&[150], 9), true),
            (with(&[248, 0, 0, 0, 0, 0, 0, 0, 4], 4), true),
            (with(&[250], 3), false),
            (with(&[251, 0, 4, 0, 3, 0, 1, 0], 16), false),
            (with(&[255, 0], 10), false),
            (with(&[255, 1, 0, 0], 0), false),
            (with(&[255, 1, 0, 2], 6), false),
        ]
    }

    fn run(chunks: &[&[u8]]) -> Result<Vec<u8>, NotRfb> {
        let mut filter = ViewOnly::new();
        let mut out = Vec::new();
        for chunk in chunks {
            filter.pass(chunk, &mut out)?;
        }
        Ok(out)
    }

    #[test]
    fn input_is_left_out_and_the_rest_is_kept() {
        for (message, kept) in messages() {
            let update: &[u8] = &[3, 0, 0, 0, 0, 0, 4, 0, 3, 0];
            let out = run(&[HELLO, &message, update]).unwrap();
            let expected = [HELLO_SHARED, if kept { &message } else { &[] }, update].concat();
            assert_eq!(out, expected, "type {}", message[0]);
        }
    }

    #[test]
    fn what_is_not_rfb_is_refused() {
        for bad in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"RFB 003.008\n\x02",
            b"RFB 003.889\n",
        ] {
            assert!(run(&[bad]).is_err());
        }
        for kind in [1u8, 7, 249, 252] {
            assert!(run(&[HELLO, &[kind]]).is_err(), "type {kind}");
        }
        assert!(run(&[HELLO, &[255, 9]]).is_err());
        assert!(run(&[HELLO, &[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]]).is_err());
        assert_eq!(
            run(&[b"RFB 003.003\n\x00\x03"]).unwrap(),
            b"RFB 003.003\n\x01\x03"
        );
    }

    proptest! {
        /// However the bytes are cut into chunks, the same passes.
        #[test]
        fn cuts_do_not_matter(
            picks in prop::collection::vec(0usize..15, 0..30),
            cuts in prop::collection::vec(1usize..40, 1..60),
        ) {
            let all = messages();
            let mut sent = HELLO.to_vec();
            let mut expected = HELLO_SHARED.to_vec();
            for pick in picks {
                let (message, kept) = &all[pick];
                sent.extend(message);
                if *kept { expected.extend(message); }
            }
            let mut chunks = Vec::new();
            let mut rest = sent.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(run(&chunks).unwrap(), expected);
        }

        /// Whatever comes, what passes is looking, and the filter lets it pass again as it is.
        #[test]
        fn arbitrary_bytes_pass_as_nothing_but_looking(said in said(), hello in any::<bool>()) {
            let sent = [if hello { HELLO } else { b"" }, &said].concat();
            let mut passed = Vec::new();
            let _ = ViewOnly::new().pass(&sent, &mut passed);
            prop_assert_eq!(more_than_looking(&passed), None, "{:?}", sent);
            prop_assert_eq!(run(&[&passed]).unwrap(), passed);
        }

        /// What the test above relies on: a filter that lets everything pass would not.
        #[test]
        fn a_filter_that_lets_everything_pass_is_seen(picks in prop::collection::vec(0usize..15, 0..30)) {
            let all = messages();
            let picked: Vec<_> = picks.into_iter().map(|pick| &all[pick]).collect();
            let said = picked.iter().flat_map(|(message, _)| message.clone());
            let passed = HELLO_SHARED.iter().copied().chain(said).collect::<Vec<_>>();
            let first = picked.iter().find(|(_, kept)| !kept).map(|(message, _)| message[0]);
            match (more_than_looking(&passed), first) {
                (None, None) => {}
                (Some(seen), Some(kind)) => prop_assert!(seen.contains(&format!("type {kind} ")), "{}", seen),
                (seen, kind) => prop_assert!(false, "{:?}, but the first is {:?}", seen, kind),
            }
        }
    }

    /// A viewer's messages, and what looks like some: whole or cut, with any fields, beside bytes that are none.
    fn said() -> impl Strategy<Value = Vec<u8>> {
        let message = (
            0usize..15,
            any::<prop::sample::Index>(),
            any::<u8>(),
            any::<bool>(),
        );
        let message = message.prop_map(|(pick, at, byte, changed)| {
            let mut message = messages()[pick].0.clone();
            let at = at.index(message.len());
            if changed {
                message[at] = byte;
            }
            message
        });
        let any_bytes = prop::collection::vec(any::<u8>(), 0..40);
        let parts = prop::collection::vec(prop_oneof![12 => message, 1 => any_bytes], 0..40);
        (parts, any::<prop::sample::Index>()).prop_map(|(parts, end)| {
            let mut said = parts.concat();
            said.truncate(said.len() - end.index(said.len() + 1) / 4);
            said
        })
    }

    #[test]
    fn each_kind_of_input_is_seen() {
        for input in [4, 5, 6, 250, 251, 252, 255, 1, 7, 249] {
            let passed = [HELLO_SHARED, &[3; 10], &[input]].concat();
            let seen = more_than_looking(&passed).unwrap();
            assert!(seen.contains(&format!("type {input} at byte 24")), "{seen}");
        }
        assert!(more_than_looking(HELLO).unwrap().contains("alone"));
        for other in [&b"RFB 003.008\n\x02"[..], b"GET / HTTP/1.1\r\n"] {
            assert!(more_than_looking(other).is_some(), "{other:?}");
        }
        let cut = [HELLO_SHARED, &[2, 0, 1, 0, 4, 4, 4]].concat();
        assert_eq!(
            more_than_looking(&cut),
            None,
            "numbers of an encoding are no keys"
        );
    }
}
