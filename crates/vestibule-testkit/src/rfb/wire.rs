//! The bytes of RFC 6143, client side: handshake (section 7.1 to 7.3), messages out (7.5), messages in (7.6), and the
//! encodings Raw, CopyRect, DesktopSize and ExtendedDesktopSize.
use super::Keysym;
use anyhow::{Context, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const RAW: i32 = 0;
const COPY_RECT: i32 = 1;
const DESKTOP_SIZE: i32 = -223;
const LAST_RECT: i32 = -224;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
/// Bytes a pixel takes in the format that we ask for.
const PIXEL: usize = 4;
/// A text of more bytes is refused.
const TEXT_LIMIT: u32 = 1 << 20;

/// What the server says.
#[derive(Debug)]
pub(super) enum Message {
    /// So many rectangles follow.
    Update(u16),
    Clipboard(String),
    /// Bell, colour map.
    Other,
}

/// One rectangle of an update.
#[derive(Debug)]
pub(super) enum Rectangle {
    /// Pixels as `B G R x`.
    Pixels {
        x: u16,
        y: u16,
        width: u16,
        height: u16,
        bgrx: Vec<u8>,
    },
    Copy {
        x: u16,
        y: u16,
        width: u16,
        height: u16,
        from_x: u16,
        from_y: u16,
    },
    Size {
        width: u16,
        height: u16,
    },
    Last,
}

/// Protocol version 3.8, security None, a shared desktop, and our pixel format and encodings; the screen's size.
pub(super) async fn handshake<S>(io: &mut S) -> Result<(u16, u16)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut version = [0; 12];
    io.read_exact(&mut version)
        .await
        .context("read the protocol version")?;
    if &version != b"RFB 003.008\n" {
        bail!(
            "the server speaks `{}`, not RFB 003.008",
            String::from_utf8_lossy(&version).trim_end()
        );
    }
    io.write_all(b"RFB 003.008\n").await?;
    let count = io.read_u8().await.context("read the security types")?;
    if count == 0 {
        bail!("the server refused: {}", text(io).await?);
    }
    let mut types = vec![0; usize::from(count)];
    io.read_exact(&mut types).await?;
    if !types.contains(&1) {
        bail!("the server offers security types {types:?}, and not 1 (None)");
    }
    io.write_u8(1).await?;
    if io.read_u32().await.context("read the security result")? != 0 {
        bail!("the server refused: {}", text(io).await?);
    }
    io.write_u8(1).await?;
    let (width, height) = (io.read_u16().await?, io.read_u16().await?);
    let mut format = [0; 16];
    io.read_exact(&mut format).await?;
    text(io).await.context("read the desktop's name")?;
    io.write_all(&set_pixel_format()).await?;
    io.write_all(&set_encodings()).await?;
    io.flush().await?;
    Ok((width, height))
}

async fn text(io: &mut (impl AsyncRead + Unpin)) -> Result<String> {
    let length = io.read_u32().await?;
    if length > TEXT_LIMIT {
        bail!("the server sends a text of {length} bytes");
    }
    let mut bytes = vec![0; length as usize];
    io.read_exact(&mut bytes).await?;
    // Latin-1 (section 7.6.4).
    Ok(bytes.into_iter().map(char::from).collect())
}

/// 32 bits, little-endian, red 16, green 8, blue 0.
fn set_pixel_format() -> Vec<u8> {
    vec![
        0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0,
    ]
}

fn set_encodings() -> Vec<u8> {
    let wanted = [
        COPY_RECT,
        RAW,
        DESKTOP_SIZE,
        EXTENDED_DESKTOP_SIZE,
        LAST_RECT,
    ];
    let mut message = vec![2, 0, 0, 5];
    for encoding in wanted {
        message.extend(encoding.to_be_bytes());
    }
    message
}

pub(super) fn update_request(incremental: bool, width: u16, height: u16) -> Vec<u8> {
    let mut message = vec![3, u8::from(incremental), 0, 0, 0, 0];
    message.extend(width.to_be_bytes());
    message.extend(height.to_be_bytes());
    message
}

pub(super) fn key(key: Keysym, down: bool) -> Vec<u8> {
    let mut message = vec![4, u8::from(down), 0, 0];
    message.extend(key.0.to_be_bytes());
    message
}

pub(super) fn pointer(buttons: u8, x: u16, y: u16) -> Vec<u8> {
    let mut message = vec![5, buttons];
    message.extend(x.to_be_bytes());
    message.extend(y.to_be_bytes());
    message
}

/// One screen of this size.
pub(super) fn set_desktop_size(width: u16, height: u16) -> Vec<u8> {
    let mut message = vec![251, 0];
    message.extend(width.to_be_bytes());
    message.extend(height.to_be_bytes());
    message.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    message.extend(width.to_be_bytes());
    message.extend(height.to_be_bytes());
    message.extend([0, 0, 0, 0]);
    message
}

pub(super) async fn read_message(io: &mut (impl AsyncRead + Unpin)) -> Result<Message> {
    match io.read_u8().await.context("read a message")? {
        0 => {
            io.read_u8().await?;
            Ok(Message::Update(io.read_u16().await?))
        }
        1 => {
            io.read_u8().await?;
            let (_first, count) = (io.read_u16().await?, io.read_u16().await?);
            let mut colours = vec![0; usize::from(count) * 6];
            io.read_exact(&mut colours).await?;
            Ok(Message::Other)
        }
        2 => Ok(Message::Other),
        3 => {
            io.read_exact(&mut [0; 3]).await?;
            Ok(Message::Clipboard(text(io).await?))
        }
        other => bail!("the server sent a message of type {other}"),
    }
}

pub(super) async fn read_rectangle(io: &mut (impl AsyncRead + Unpin)) -> Result<Rectangle> {
    let (x, y) = (io.read_u16().await?, io.read_u16().await?);
    let (width, height) = (io.read_u16().await?, io.read_u16().await?);
    match io.read_i32().await? {
        RAW => {
            let mut bgrx = vec![0; usize::from(width) * usize::from(height) * PIXEL];
            io.read_exact(&mut bgrx).await.context("read pixels")?;
            Ok(Rectangle::Pixels {
                x,
                y,
                width,
                height,
                bgrx,
            })
        }
        COPY_RECT => {
            let (from_x, from_y) = (io.read_u16().await?, io.read_u16().await?);
            Ok(Rectangle::Copy {
                x,
                y,
                width,
                height,
                from_x,
                from_y,
            })
        }
        DESKTOP_SIZE => Ok(Rectangle::Size { width, height }),
        EXTENDED_DESKTOP_SIZE => {
            let screens = io.read_u8().await?;
            io.read_exact(&mut [0; 3]).await?;
            let mut layout = vec![0; usize::from(screens) * 16];
            io.read_exact(&mut layout).await?;
            Ok(Rectangle::Size { width, height })
        }
        LAST_RECT => Ok(Rectangle::Last),
        other => bail!("the server sent the encoding {other}, which was not asked for"),
    }
}
