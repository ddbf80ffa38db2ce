//! QEMU's command line for one VM. Every value that comes from outside is an argument of its own or JSON, so that a
//! path with a comma or a quote stays a path.
use crate::driver::Launch;
use serde_json::json;
use std::os::fd::OwnedFd;
use vestibule_api::stream::{CONFIG_DRIVE_SERIAL, PORT_NAME};

/// The set that holds the config drive's descriptor.
const CONFIG_SET: u32 = 1;
/// The set that holds the write end of the serial console.
const SERIAL_SET: u32 = 2;
/// Serial number of the root disk, by which the initrd finds it.
const ROOT_SERIAL: &str = "vestibule-root";

/// Which processor runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accel {
    Kvm,
    /// QEMU's own translator: needs nothing of the host's, and is 5 to 20 times slower.
    Tcg,
}

/// Descriptors that the child inherits.
#[derive(Debug)]
pub(super) struct Descriptors {
    pub(super) qmp: OwnedFd,
    pub(super) stream: OwnedFd,
    pub(super) serial: OwnedFd,
    pub(super) config: OwnedFd,
}

impl Accel {
    /// The name in [`crate::driver::Capabilities::driver`].
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "qemu/kvm",
            Self::Tcg => "qemu/tcg",
        }
    }

    /// What the kernel is told besides the image's own command line.
    const fn cmdline(self) -> &'static str {
        match self {
            // A reboot through the triple fault is a clean exit of QEMU (`-no-reboot`).
            Self::Kvm => "console=ttyS0 reboot=t random.trust_cpu=on",
            // Under TCG the guest shares nothing with anybody: mitigations cost and protect nothing.
            Self::Tcg => "console=ttyS0 reboot=t random.trust_cpu=on tsc=reliable mitigations=off",
        }
    }
}

/// All arguments, without the program.
pub(super) fn argv(accel: Accel, launch: &Launch, fds: &Descriptors) -> Vec<String> {
    use crate::process::number;
    let root_file = json!({
        "node-name": "root-file", "driver": "file", "filename": launch.root, "read-only": true,
        "auto-read-only": false, "locking": "off",
    });
    let config_file = json!({
        "node-name": "config-file", "driver": "file", "filename": format!("/dev/fdset/{CONFIG_SET}"),
        "read-only": true, "auto-read-only": false, "locking": "off",
    });
    let mut args = Args(Vec::new());
    args.pair("-name", format!("vestibule-{}", launch.machine_id))
        .words("-nodefaults -no-user-config -no-reboot -display none -msg timestamp=on")
        .pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        )
        .pair(
            "-machine",
            "q35,usb=off,vmport=off,smbus=off,sata=off,graphics=off",
        )
        .pair(
            "-accel",
            if accel == Accel::Kvm {
                "kvm"
            } else {
                "tcg,thread=multi"
            },
        )
        .pair("-cpu", if accel == Accel::Kvm { "host" } else { "max" })
        .pair("-smp", launch.vcpus.to_string())
        .pair("-m", format!("{}M", launch.memory_mib))
        .pair("-kernel", launch.kernel.as_str())
        .pair("-initrd", launch.initrd.as_str())
        .pair("-append", format!("{} {}", launch.cmdline, accel.cmdline()))
        .pair(
            "-add-fd",
            format!("fd={},set={CONFIG_SET}", number(&fds.config)),
        )
        .pair(
            "-add-fd",
            format!("fd={},set={SERIAL_SET}", number(&fds.serial)),
        )
        .pair(
            "-chardev",
            format!("file,id=serial,append=on,path=/dev/fdset/{SERIAL_SET}"),
        )
        .pair("-serial", "chardev:serial")
        .pair("-chardev", format!("socket,id=qmp,fd={}", number(&fds.qmp)))
        .pair("-mon", "chardev=qmp,mode=control")
        .pair("-blockdev", root_file.to_string())
        .pair("-blockdev", raw_node("root").to_string())
        .pair(
            "-device",
            format!("virtio-blk-pci,drive=root,serial={ROOT_SERIAL}"),
        )
        .pair("-blockdev", config_file.to_string())
        .pair("-blockdev", raw_node("config").to_string())
        .pair(
            "-device",
            format!("virtio-blk-pci,drive=config,serial={CONFIG_DRIVE_SERIAL}"),
        )
        .pair(
            "-chardev",
            format!(
                "socket,id=stream,fd={},server=on,wait=off",
                number(&fds.stream)
            ),
        )
        // Port 0 is reserved for a console, so one port needs two.
        .pair("-device", "virtio-serial-pci,max_ports=2")
        .pair(
            "-device",
            format!("virtserialport,id=stream,chardev=stream,name={PORT_NAME}"),
        )
        .pair("-object", "rng-builtin,id=rng")
        .pair("-device", "virtio-rng-pci,rng=rng");
    args.0
}

/// The raw format on top of the node `<name>-file`.
fn raw_node(name: &str) -> serde_json::Value {
    json!({ "node-name": name, "driver": "raw", "file": format!("{name}-file"), "read-only": true })
}

struct Args(Vec<String>);

impl Args {
    fn pair(&mut self, option: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(option.to_owned());
        self.0.push(value.into());
        self
    }

    fn words(&mut self, words: &str) -> &mut Self {
        self.0.extend(words.split(' ').map(str::to_owned));
        self
    }
}
