//! Capabilities that a unit's processes can ever have (`capabilities(7)`, `CapabilityBoundingSet=`).
use super::{Assignment, Unit};

/// Names by number (`include/uapi/linux/capability.h`).
const NAMES: [&str; 41] = [
    "cap_chown",
    "cap_dac_override",
    "cap_dac_read_search",
    "cap_fowner",
    "cap_fsetid",
    "cap_kill",
    "cap_setgid",
    "cap_setuid",
    "cap_setpcap",
    "cap_linux_immutable",
    "cap_net_bind_service",
    "cap_net_broadcast",
    "cap_net_admin",
    "cap_net_raw",
    "cap_ipc_lock",
    "cap_ipc_owner",
    "cap_sys_module",
    "cap_sys_rawio",
    "cap_sys_chroot",
    "cap_sys_ptrace",
    "cap_sys_pacct",
    "cap_sys_admin",
    "cap_sys_boot",
    "cap_sys_nice",
    "cap_sys_resource",
    "cap_sys_time",
    "cap_sys_tty_config",
    "cap_mknod",
    "cap_lease",
    "cap_audit_write",
    "cap_audit_control",
    "cap_setfcap",
    "cap_mac_override",
    "cap_mac_admin",
    "cap_syslog",
    "cap_wake_alarm",
    "cap_block_suspend",
    "cap_audit_read",
    "cap_perfmon",
    "cap_bpf",
    "cap_checkpoint_restore",
];

/// The bounding set of a unit that has one, bit n for capability n, and the line that gave it last.
pub fn bounding_set(unit: &Unit) -> Option<(u64, &Assignment)> {
    let lines = unit
        .assignments
        .iter()
        .filter(|a| a.section == "Service" && a.key == "CapabilityBoundingSet");
    let mut set = None;
    for line in lines {
        let value = line.value.trim();
        let (invert, names) = value
            .strip_prefix('~')
            .map_or((false, value), |rest| (true, rest));
        // A name that is not known is skipped, as systemd does.
        let sum = names
            .split_whitespace()
            .filter_map(|name| NAMES.iter().position(|n| n.eq_ignore_ascii_case(name)))
            .fold(0_u64, |sum, bit| sum | (1_u64 << bit));
        // As in systemd's `config_parse_capability_set`: an empty set begins anew, and so does the first line.
        let next = match set {
            Some((before, _)) if sum != 0 && before != u64::MAX => {
                if invert {
                    before & !sum
                } else {
                    before | sum
                }
            }
            Some(_) | None if invert => !sum,
            Some(_) | None => sum,
        };
        set = Some((next, line));
    }
    set
}

/// The names of a set, with commas.
pub fn names(set: u64) -> String {
    let name = |bit: usize| {
        NAMES
            .get(bit)
            .map_or_else(|| bit.to_string(), |n| (*n).to_owned())
    };
    let bits = (0..64).filter(|bit| set & (1_u64 << bit) != 0);
    bits.map(name).collect::<Vec<_>>().join(",")
}
