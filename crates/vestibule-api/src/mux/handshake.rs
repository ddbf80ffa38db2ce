//! The handshake of [`crate::stream`]: each side proves that it holds the key made for this VM.
//!
//! It reads exactly its own bytes and not one more, so the same transport can be handed to the multiplexer afterwards.
//! It never gives up by the clock: callers bound it with a timeout.
use crate::stream::{ConfigDrive, GUEST_LABEL, HOST_LABEL, KEY_LEN, MAGIC, RESYNC_LIMIT};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::{Zeroize, Zeroizing};

/// A host that has heard no hello for so long asks for it, and then after twice as long each time: the guest may have said it to
/// whoever was there before. Longer than a guest takes that is not busy.
const ASK_FIRST: Duration = Duration::from_secs(1);
/// Where in [`MAGIC`] the version is.
const VERSION: usize = MAGIC.len() - 2;
/// Stands in an answer where the hello's nonce would be.
const ASK: [u8; KEY_LEN] = [0; KEY_LEN];
/// At most so many hellos or answers that lead to nothing are passed over. A host asks fewer times in an hour.
const REPEATS: u32 = 64;

/// Why the two sides did not come together.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("{step} of the stream's handshake")]
    Io {
        step: &'static str,
        #[source]
        err: std::io::Error,
    },
    /// So many bytes came that are no hello; the other side is not an agent or a runner.
    #[error("no hello within {RESYNC_LIMIT} bytes")]
    NoHello,
    /// The peer is an agent or a runner of another version.
    #[error("the other side speaks version `{0}` of the stream's handshake, this one `{ours}`", ours = char::from(MAGIC[VERSION]))]
    Version(char),
    /// The peer answered, and not with the key of this VM.
    #[error("the other side does not hold this VM's key")]
    WrongKey,
}

/// The key of one life of a VM. Printed as a placeholder, zeroed when dropped.
#[derive(Clone)]
pub struct StreamKey(Zeroizing<[u8; KEY_LEN]>);

/// The text is not base64 of [`KEY_LEN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream key is not {KEY_LEN} bytes in base64")]
pub struct BadKey;

impl StreamKey {
    /// A fresh key from the operating system's generator.
    #[must_use]
    pub fn generate() -> Self {
        Self(Zeroizing::new(random()))
    }

    /// The key that the config drive carries.
    ///
    /// # Errors
    /// When it is not base64 of [`KEY_LEN`] bytes.
    pub fn of(drive: &ConfigDrive) -> Result<Self, BadKey> {
        let mut bytes = BASE64.decode(&drive.stream_key).map_err(|_| BadKey)?;
        let key = <[u8; KEY_LEN]>::try_from(bytes.as_slice()).map_err(|_| BadKey);
        bytes.zeroize();
        Ok(Self(Zeroizing::new(key?)))
    }

    /// The form that [`ConfigDrive::stream_key`] holds. It must reach nothing but the config drive.
    #[must_use]
    pub fn to_base64(&self) -> String {
        BASE64.encode(self.0.as_slice())
    }

    fn mac(&self, label: &[u8], guest: &[u8], host: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.as_slice())
            .expect("HMAC takes a key of any length (RFC 2104)");
        mac.update(label);
        mac.update(guest);
        mac.update(host);
        mac
    }

    fn tag(&self, label: &[u8], guest: &[u8], host: &[u8]) -> [u8; KEY_LEN] {
        self.mac(label, guest, host).finalize().into_bytes().into()
    }

    /// In constant time.
    fn check(
        &self,
        label: &[u8],
        guest: &[u8],
        host: &[u8],
        tag: &[u8],
    ) -> Result<(), HandshakeError> {
        self.mac(label, guest, host)
            .verify_slice(tag)
            .map_err(|_| HandshakeError::WrongKey)
    }
}

impl std::fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StreamKey([secret])")
    }
}

/// The host's side: waits for the guest's hello, skipping stale bytes, and returns when the guest has proven itself.
///
/// # Errors
/// When the transport ends, no hello comes within [`RESYNC_LIMIT`] bytes, or the guest's tag is wrong.
pub async fn host_handshake<S>(io: &mut S, key: &StreamKey) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut guest = ask_for_hello(io).await?;
    let mut host: [u8; KEY_LEN] = random();
    answer(io, key, &guest, &host).await?;
    for _ in 0..REPEATS {
        let tag: [u8; KEY_LEN] = receive(io, "read the guest's proof").await?;
        let Some(begun) = tag.strip_prefix(&MAGIC) else {
            return key.check(GUEST_LABEL, &guest, &host, &tag);
        };
        // The guest that said the hello before has begun anew, or says it once more because it was asked to.
        let rest: [u8; MAGIC.len()] = receive(io, "read the guest's hello").await?;
        let again = [begun, &rest].concat();
        if again != guest {
            guest.copy_from_slice(&again);
            host = random();
            answer(io, key, &guest, &host).await?;
        }
    }
    Err(HandshakeError::NoHello)
}

/// Waits for a hello; returns its nonce.
async fn ask_for_hello<S>(io: &mut S) -> Result<[u8; KEY_LEN], HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(io);
    let hello = async {
        skip_to_magic(&mut reader).await?;
        receive(&mut reader, "read the guest's hello").await
    };
    tokio::pin!(hello);
    let mut patience = ASK_FIRST;
    loop {
        tokio::select! {
            hello = &mut hello => return hello,
            () = tokio::time::sleep(patience) => {}
        }
        let ask = [&MAGIC[..], &ASK].concat();
        // Who does not read cannot be asked, and may be about to speak.
        tokio::select! {
            hello = &mut hello => return hello,
            sent = transmit(&mut writer, &ask, "ask for the guest's hello") => sent?,
        }
        patience *= 2;
    }
}

async fn answer<S: AsyncWrite + Unpin>(
    io: &mut S,
    key: &StreamKey,
    guest: &[u8; KEY_LEN],
    host: &[u8; KEY_LEN],
) -> Result<(), HandshakeError> {
    let tag = key.tag(HOST_LABEL, guest, host);
    let answer = [&MAGIC[..], guest, host, &tag].concat();
    transmit(io, &answer, "send the host's answer").await
}

/// The guest's side: sends a hello, checks the host's answer, and proves itself.
///
/// # Errors
/// When the transport ends, no answer comes within [`RESYNC_LIMIT`] bytes, or the host's tag is wrong.
pub async fn guest_handshake<S>(io: &mut S, key: &StreamKey) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let guest: [u8; KEY_LEN] = random();
    let hello = [&MAGIC[..], &guest].concat();
    transmit(io, &hello, "send the guest's hello").await?;
    for _ in 0..REPEATS {
        skip_to_magic(io).await?;
        let answers: [u8; KEY_LEN] = receive(io, "read the host's answer").await?;
        if answers == ASK {
            transmit(io, &hello, "send the guest's hello again").await?;
        } else if answers == guest {
            let host: [u8; KEY_LEN] = receive(io, "read the host's answer").await?;
            let tag: [u8; KEY_LEN] = receive(io, "read the host's answer").await?;
            key.check(HOST_LABEL, &guest, &host, &tag)?;
            let proof = key.tag(GUEST_LABEL, &guest, &host);
            return transmit(io, &proof, "send the guest's proof").await;
        }
        // Else it answers a hello of whoever was here before; the rest of it is skipped on the way to the next.
    }
    Err(HandshakeError::NoHello)
}

/// Reads up to and including [`MAGIC`]. Never reads beyond it: as many bytes of it as are matched already need not come
/// again, so the rest is the most that may be asked for.
async fn skip_to_magic<S: AsyncRead + Unpin>(io: &mut S) -> Result<(), HandshakeError> {
    let mut window = [0u8; MAGIC.len()];
    let (mut matched, mut read) = (0, 0);
    while matched < MAGIC.len() {
        if read >= RESYNC_LIMIT + MAGIC.len() {
            return Err(HandshakeError::NoHello);
        }
        io.read_exact(&mut window[matched..])
            .await
            .map_err(|err| HandshakeError::Io {
                step: "wait for the hello",
                err,
            })?;
        read += MAGIC.len() - matched;
        let other = window[VERSION];
        if other != MAGIC[VERSION]
            && window[..VERSION] == MAGIC[..VERSION]
            && window[VERSION + 1..] == MAGIC[VERSION + 1..]
        {
            return Err(HandshakeError::Version(char::from(other)));
        }
        let shift = (0..=MAGIC.len())
            .find(|&n| MAGIC.starts_with(&window[n..]))
            .unwrap_or(MAGIC.len());
        window.copy_within(shift.., 0);
        matched = MAGIC.len() - shift;
    }
    Ok(())
}

async fn receive<S, const N: usize>(
    io: &mut S,
    step: &'static str,
) -> Result<[u8; N], HandshakeError>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = [0u8; N];
    io.read_exact(&mut bytes)
        .await
        .map_err(|err| HandshakeError::Io { step, err })?;
    Ok(bytes)
}

async fn transmit<S: AsyncWrite + Unpin>(
    io: &mut S,
    bytes: &[u8],
    step: &'static str,
) -> Result<(), HandshakeError> {
    let sent = async {
        io.write_all(bytes).await?;
        io.flush().await
    };
    sent.await.map_err(|err| HandshakeError::Io { step, err })
}

fn random() -> [u8; KEY_LEN] {
    let mut bytes = [0u8; KEY_LEN];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes
}
