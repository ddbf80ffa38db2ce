//! D-Bus messages as bytes (D-Bus Specification, "Message Protocol"): little-endian, and only the types that systemd's
//! manager interface uses. General libraries do not read systemd's private socket: it names itself as sender by a
//! well-known name, which the specification reserves for unique ones.

/// The bytes are not the message that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message is malformed at byte {at}")]
pub(crate) struct Malformed {
    at: usize,
}

/// `METHOD_CALL` and its like.
pub(super) const CALL: u8 = 1;
pub(super) const REPLY: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// Length of the head's fixed part, with the length of its fields.
pub(super) const FIXED: usize = 16;

/// Header fields by number.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const SIGNATURE: u8 = 8;

/// Builds values; alignment counts from the beginning.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn string(&mut self, text: &str) {
        self.u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
    }

    /// An array of strings.
    pub(super) fn strings<'a>(&mut self, texts: impl IntoIterator<Item = &'a String>) {
        self.u32(0);
        let begin = self.0.len();
        texts.into_iter().for_each(|text| self.string(text));
        let length = u32::try_from(self.0.len() - begin).unwrap_or(u32::MAX);
        self.0[begin - 4..begin].copy_from_slice(&length.to_le_bytes());
    }

    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
    }

    fn field(&mut self, number: u8, kind: &str, text: &str) {
        self.align(8);
        self.0.push(number);
        self.signature(kind);
        if kind == "g" {
            self.signature(text);
        } else {
            self.string(text);
        }
    }
}

/// A method call, ready to be sent. `signature` is that of `body`.
pub(super) fn call(
    serial: u32,
    path: &str,
    interface: &str,
    method: &str,
    signature: &str,
    body: &Writer,
) -> Vec<u8> {
    let mut head = Writer(vec![b'l', CALL, 0, 1]);
    head.u32(u32::try_from(body.0.len()).unwrap_or(u32::MAX));
    head.u32(serial);
    head.u32(0);
    head.field(PATH, "o", path);
    head.field(INTERFACE, "s", interface);
    head.field(MEMBER, "s", method);
    if !signature.is_empty() {
        head.field(SIGNATURE, "g", signature);
    }
    let fields = u32::try_from(head.0.len() - FIXED).unwrap_or(u32::MAX);
    head.0[12..16].copy_from_slice(&fields.to_le_bytes());
    head.align(8);
    head.0.extend_from_slice(&body.0);
    head.0
}

/// Reads values; alignment counts from the beginning.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn wrong<T>(&self) -> Result<T, Malformed> {
        Err(Malformed { at: self.at })
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let Some(taken) = self.bytes.get(self.at..).and_then(|rest| rest.get(..count)) else {
            return self.wrong();
        };
        self.at += count;
        Ok(taken)
    }

    fn align(&mut self, to: usize) -> Result<(), Malformed> {
        let padding = self.at.next_multiple_of(to) - self.at;
        self.take(padding).map(drop)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.align(4)?;
        let at = self.at;
        self.take(4)?
            .try_into()
            .map(u32::from_le_bytes)
            .map_err(|_| Malformed { at })
    }

    fn length(&mut self) -> Result<usize, Malformed> {
        let at = self.at;
        usize::try_from(self.u32()?).map_err(|_| Malformed { at })
    }

    /// A string or an object path.
    pub(super) fn string(&mut self) -> Result<String, Malformed> {
        let length = self.length()?;
        self.text(length)
    }

    fn text(&mut self, length: usize) -> Result<String, Malformed> {
        let at = self.at;
        let text = self.take(length)?.to_vec();
        self.take(1)?;
        String::from_utf8(text).map_err(|_| Malformed { at })
    }

    fn signature(&mut self) -> Result<String, Malformed> {
        let length = self.u8()?;
        self.text(length.into())
    }

    /// An array of structs, each read by `one`.
    pub(super) fn structs<T>(
        &mut self,
        mut one: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        let length = self.length()?;
        self.align(8)?;
        let end = self.at.saturating_add(length);
        let mut all = Vec::new();
        while self.at < end {
            self.align(8)?;
            all.push(one(self)?);
        }
        if self.at == end {
            Ok(all)
        } else {
            self.wrong()
        }
    }

    /// A variant that holds a text or a number.
    pub(super) fn variant(&mut self) -> Result<Value, Malformed> {
        match self.signature()?.as_str() {
            "s" | "o" => Ok(Value::Text(self.string()?)),
            "g" => Ok(Value::Text(self.signature()?)),
            "u" => Ok(Value::Number(self.u32()?.into())),
            "i" => Ok(Value::Number(
                i32::from_le_bytes(self.u32()?.to_le_bytes()).into(),
            )),
            _ => self.wrong(),
        }
    }
}

/// What a variant holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Number(i64),
}

impl Value {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Number(_) => "",
        }
    }

    pub(super) fn number<T: TryFrom<i64>>(&self) -> Option<T> {
        match self {
            Self::Number(number) => T::try_from(*number).ok(),
            Self::Text(_) => None,
        }
    }
}

/// What a head says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: u8,
    pub(super) answers: u32,
    pub(super) error: String,
    /// Types of the body.
    pub(super) signature: String,
}

/// Of a head's fixed part: the lengths of its fields, padding included, and of the body.
pub(super) fn lengths(fixed: &[u8; FIXED]) -> Result<(usize, usize), Malformed> {
    let mut reader = Reader {
        bytes: fixed,
        at: 4,
    };
    if fixed[0] != b'l' || fixed[3] != 1 {
        return Err(Malformed { at: 0 });
    }
    let body = reader.length()?;
    reader.u32()?;
    Ok((reader.length()?.next_multiple_of(8), body))
}

/// Reads a whole head, fixed part and fields.
pub(super) fn head(bytes: &[u8]) -> Result<Head, Malformed> {
    let mut head = Head {
        kind: *bytes.get(1).ok_or(Malformed { at: 1 })?,
        ..Head::default()
    };
    let mut reader = Reader { bytes, at: 12 };
    let fields = reader.structs(|reader| Ok((reader.u8()?, reader.variant()?)))?;
    for (number, value) in fields {
        match number {
            REPLY_SERIAL => head.answers = value.number().unwrap_or(0),
            ERROR_NAME => head.error = value.text().to_owned(),
            SIGNATURE => head.signature = value.text().to_owned(),
            _ => {}
        }
    }
    Ok(head)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    impl Writer {
        pub(in super::super) fn text_variant(&mut self, text: &str) {
            self.signature("s");
            self.string(text);
        }
    }

    fn message_of(
        kind: u8,
        serial: u32,
        body: &Writer,
        fields: impl FnOnce(&mut Writer),
    ) -> Vec<u8> {
        let mut head = Writer(vec![b'l', kind, 1, 1]);
        head.u32(u32::try_from(body.0.len()).unwrap());
        head.u32(serial);
        head.u32(0);
        fields(&mut head);
        // DESTINATION is missing and SENDER a well-known name, as systemd has it.
        head.field(7, "s", "org.freedesktop.systemd1");
        let length = u32::try_from(head.0.len() - FIXED).unwrap();
        head.0[12..16].copy_from_slice(&length.to_le_bytes());
        head.align(8);
        head.0.extend_from_slice(&body.0);
        head.0
    }

    pub(in super::super) fn signal(name: &str) -> Vec<u8> {
        message_of(SIGNAL, 9, &Writer::default(), |head| {
            head.field(PATH, "o", "/org/freedesktop/systemd1");
            head.field(INTERFACE, "s", "org.freedesktop.systemd1.Manager");
            head.field(MEMBER, "s", name);
        })
    }

    pub(in super::super) fn reply(
        to: u32,
        signature: &str,
        fill: impl FnOnce(&mut Writer),
    ) -> Vec<u8> {
        let mut body = Writer::default();
        fill(&mut body);
        message_of(REPLY, 10, &body, |head| {
            head.align(8);
            head.0.push(REPLY_SERIAL);
            head.signature("u");
            head.u32(to);
            head.field(SIGNATURE, "g", signature);
        })
    }

    fn message() -> Vec<u8> {
        let mut body = Writer::default();
        body.strings(&["a.service".to_owned(), "b".to_owned()]);
        call(
            7,
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            "ListUnitsByNames",
            "as",
            &body,
        )
    }

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let bytes = message();
        let (fields, body) = lengths(bytes[..FIXED].try_into().unwrap()).unwrap();
        // An array: its length, then strings, each aligned to four, with a NUL that its length does not count.
        assert_eq!(
            &bytes[FIXED + fields..],
            b"\x16\0\0\0\x09\0\0\0a.service\0\0\0\x01\0\0\0b\0"
        );
        assert_eq!((bytes[0], bytes[1], bytes[3], body), (b'l', CALL, 1, 26));
        // The first field: PATH, in a variant of type `o`.
        assert_eq!(&bytes[16..24], b"\x01\x01o\0\x19\0\0\0");
        let head = head(&bytes[..FIXED + fields]).unwrap();
        assert_eq!((head.kind, head.signature.as_str()), (CALL, "as"));
    }

    #[test]
    fn damaged_messages_are_errors_and_never_panics() {
        let bytes = message();
        for cut in 0..bytes.len() {
            let _ = head(&bytes[..cut]);
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = bytes.clone();
                bad[cut] = value;
                let _ = head(&bad);
                let mut reader = Reader::new(&bad);
                let _ = reader.structs(|reader| reader.variant());
            }
        }
        assert!(lengths(b"B\x01\x00\x01\x1a\x00\x00\x00\x07\x00\x00\x00\x85\x00\x00\x00").is_err());
    }

    #[test]
    fn variants_hold_texts_and_numbers() {
        let mut writer = Writer::default();
        writer.signature("i");
        writer.u32(u32::MAX);
        writer.signature("s");
        writer.string("running");
        let bytes = writer.0;
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.variant().unwrap().number::<i32>(), Some(-1));
        assert_eq!(reader.variant().unwrap().text(), "running");
    }
}
