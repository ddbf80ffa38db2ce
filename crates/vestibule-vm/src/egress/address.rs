//! Which addresses are public. Everything that is not plain global unicast is refused, and so is every notation that
//! carries such an IPv4 address inside an IPv6 one.
//!
//! Sources: the IANA special-purpose address registries (RFC 6890 and its updates), RFC 4291 (mapped, compatible),
//! RFC 6052 and 8215 (NAT64), RFC 3056 (6to4), RFC 4380 (Teredo), RFC 9637 (documentation).
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use vestibule_api::egress::EgressReason;

/// Why a guest may not reach `address`; `None` for a public one.
pub fn refuse(address: IpAddr) -> Option<EgressReason> {
    match address {
        IpAddr::V4(v4) => refuse_v4(v4),
        IpAddr::V6(v6) => refuse_v6(v6),
    }
}

fn refuse_v4(address: Ipv4Addr) -> Option<EgressReason> {
    let reason = match address.octets() {
        [127, ..] => EgressReason::Loopback,
        [10, ..] | [192, 168, ..] => EgressReason::Private,
        [172, b, ..] if b & 0xf0 == 16 => EgressReason::Private,
        [100, b, ..] if b & 0xc0 == 64 => EgressReason::Private,
        // 168.63.129.16 is a cloud's metadata service in the middle of public space.
        [169, 254, ..] | [168, 63, 129, 16] => EgressReason::LinkLocal,
        // This network, IETF assignments, documentation, 6to4 relays, benchmarking, multicast, reserved, broadcast.
        [0, ..]
        | [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18 | 19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _]
        | [224..=255, ..] => EgressReason::NotGlobal,
        _ => return None,
    };
    Some(reason)
}

fn refuse_v6(address: Ipv6Addr) -> Option<EgressReason> {
    let s = address.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    let inner = |high, low| refuse_v4(v4(high, low));
    match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some(EgressReason::NotGlobal),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(EgressReason::Loopback),
        // Mapped and the well-known NAT64 prefix lead to the IPv4 address itself.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            inner(high, low)
        }
        // Compatible, translated, local NAT64, 6to4 and Teredo lead nowhere that anybody needs.
        [0, 0, 0, 0, 0, 0, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 1, _, _, _, high, low]
        | [0x2002, high, low, ..] => inner(high, low).or(Some(EgressReason::NotGlobal)),
        [0x2001, 0, server_high, server_low, _, _, high, low] => inner(!high, !low)
            .or_else(|| inner(server_high, server_low))
            .or(Some(EgressReason::NotGlobal)),
        [a, ..] if a & 0xffc0 == 0xfe80 => Some(EgressReason::LinkLocal),
        // Unique-local, and site-local of old.
        [a, ..] if a & 0xfe00 == 0xfc00 || a & 0xffc0 == 0xfec0 => Some(EgressReason::Private),
        // IETF assignments, documentation.
        [0x2001, b, ..] if b & 0xfe00 == 0 || b == 0xdb8 => Some(EgressReason::NotGlobal),
        [0x3fff, b, ..] if b & 0xf000 == 0 => Some(EgressReason::NotGlobal),
        [a, ..] if a & 0xe000 == 0x2000 => None,
        _ => Some(EgressReason::NotGlobal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EgressReason::{LinkLocal, Loopback, NotGlobal, Private};
    use proptest::prelude::*;

    const REFUSED_V4: &[(&str, EgressReason)] = &[
        ("0.0.0.0", NotGlobal),
        ("0.1.2.3", NotGlobal),
        ("127.0.0.1", Loopback),
        ("127.255.255.254", Loopback),
        ("10.0.0.1", Private),
        ("172.16.0.1", Private),
        ("172.31.255.255", Private),
        ("192.168.1.1", Private),
        ("100.64.0.1", Private),
        ("100.127.255.255", Private),
        ("169.254.169.254", LinkLocal),
        ("168.63.129.16", LinkLocal),
        ("192.0.0.192", NotGlobal),
        ("192.0.2.1", NotGlobal),
        ("192.88.99.1", NotGlobal),
        ("198.18.0.1", NotGlobal),
        ("198.19.255.255", NotGlobal),
        ("198.51.100.1", NotGlobal),
        ("203.0.113.1", NotGlobal),
        ("224.0.0.1", NotGlobal),
        ("239.255.255.255", NotGlobal),
        ("240.0.0.1", NotGlobal),
        ("255.255.255.255", NotGlobal),
    ];

    #[test]
    fn ipv4_and_every_ipv6_form_of_it() {
        for (text, reason) in REFUSED_V4 {
            let v4: Ipv4Addr = text.parse().unwrap();
            assert_eq!(refuse(v4.into()), Some(*reason), "{text}");
            let [a, b, c, d] = v4.octets();
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            for form in [
                format!("::ffff:{v4}"),
                format!("64:ff9b::{v4}"),
                format!("64:ff9b:1::{v4}"),
                format!("2002:{high:x}:{low:x}::1"),
                format!("2001:0:808:808::{:x}:{:x}", !high, !low),
                format!("2001:0:{high:x}:{low:x}::f7f7:f7f7"),
            ] {
                let v6: Ipv6Addr = form.parse().unwrap();
                assert_eq!(refuse(v6.into()), Some(*reason), "{form}");
            }
            assert!(
                refuse(format!("::{v4}").parse().unwrap()).is_some(),
                "::{v4}"
            );
        }
    }

    #[test]
    fn ipv6() {
        for (text, reason) in [
            ("::", NotGlobal),
            ("::1", Loopback),
            ("fe80::1", LinkLocal),
            ("febf::1", LinkLocal),
            ("fec0::1", Private),
            ("fc00::1", Private),
            ("fd00:ec2::254", Private),
            ("ff02::1", NotGlobal),
            ("2001:db8::1", NotGlobal),
            ("2001:2::1", NotGlobal),
            ("3fff::1", NotGlobal),
            ("100::1", NotGlobal),
            ("5f00::1", NotGlobal),
            ("4000::1", NotGlobal),
        ] {
            assert_eq!(refuse(text.parse().unwrap()), Some(reason), "{text}");
        }
    }

    #[test]
    fn public_addresses_pass() {
        for text in [
            "1.1.1.1",
            "8.8.8.8",
            "172.15.255.255",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "169.253.0.1",
            "192.0.1.1",
            "198.17.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450:4001::1",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
        ] {
            assert_eq!(refuse(text.parse().unwrap()), None, "{text}");
        }
    }

    proptest! {
        /// What the standard library knows to be special is never public here.
        #[test]
        fn agrees_with_the_standard_library(bits: u32) {
            let v4 = Ipv4Addr::from(bits);
            let special = v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast()
                || v4.is_broadcast() || v4.is_documentation() || v4.is_unspecified();
            if special {
                prop_assert!(refuse(v4.into()).is_some());
                prop_assert!(refuse(v4.to_ipv6_mapped().into()).is_some());
                prop_assert!(refuse(v4.to_ipv6_compatible().into()).is_some());
            }
            prop_assert_eq!(refuse(v4.into()), refuse(v4.to_ipv6_mapped().into()));
        }
    }
}
