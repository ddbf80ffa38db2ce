//! QEMU's command line for one VM. Every value that comes from outside is an argument of its own or JSON, so that a
//! path with a comma or a quote stays a path.
use crate::driver::{Capabilities, Launch, Memory};
use serde_json::json;
use sha2::{Digest, Sha256};
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
    /// The one that a probe chose.
    pub(super) fn of(capabilities: &Capabilities) -> Self {
        if capabilities.driver == Self::Kvm.name() {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    /// The CPU model.
    pub(super) const fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max",
        }
    }

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

/// The kernel command line: the image's and the machine's.
pub(super) fn cmdline(accel: Accel, launch: &Launch) -> String {
    format!("{} {}", launch.cmdline, accel.cmdline())
}

/// QEMU's arguments.
pub(super) struct Argv {
    pub(super) args: Vec<String>,
    /// SHA-256 of the arguments without what differs from VM to VM, nor how the memory is opened: VMs that have the same
    /// are the same machine to their guests.
    pub(super) shape: String,
}

/// The `-object` of the guest's memory, where that is a file.
fn memory(capabilities: &Capabilities, launch: &Launch) -> Option<serde_json::Value> {
    let size = u64::from(launch.memory_mib) << 20;
    let backend = |path: &camino::Utf8Path, share| {
        json!({
            "qom-type": "memory-backend-file", "id": "mem", "size": size, "mem-path": path, "share": share,
        })
    };
    match &launch.memory {
        Memory::Own => None,
        Memory::Shared(path) => Some(backend(path, true)),
        Memory::Restored(restored) => {
            let mut object = backend(&restored.memory, false);
            if capabilities.read_only_memory {
                object["readonly"] = json!(true);
                object["rom"] = json!("off");
            }
            Some(object)
        }
    }
}

/// Translated code under TCG, in MiB, of this VM's alone; QEMU would take up to 1024. Measured on two cores: a sign-in with wrangler
/// in 162 s with 512 MiB, 190 s with 256, 272 s with 128 (what does not fit is translated again), and an idle restored
/// browser of 2 GiB costs 0.27, 0.20 and 0.13 of the guest's memory.
const TRANSLATED_MIB: u32 = 512;

/// All arguments, without the program.
pub(super) fn argv(capabilities: &Capabilities, launch: &Launch, fds: &Descriptors) -> Argv {
    use crate::process::number;
    let accel = Accel::of(capabilities);
    let memory = memory(capabilities, launch);
    let backend = if memory.is_some() {
        ",memory-backend=mem"
    } else {
        ""
    };
    let root_file = json!({
        "node-name": "root-file", "driver": "file", "filename": launch.root, "read-only": true,
        "auto-read-only": false, "locking": "off",
    });
    let config_file = json!({
        "node-name": "config-file", "driver": "file", "filename": format!("/dev/fdset/{CONFIG_SET}"),
        "read-only": true, "auto-read-only": false, "locking": "off",
    });
    let mut args = Args::default();
    args.own("-name", format!("vestibule-{}", launch.machine_id))
        .words("-nodefaults -no-user-config -no-reboot -display none -msg timestamp=on")
        .pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        )
        .pair(
            "-machine",
            format!(
                "{},usb=off,vmport=off,smbus=off,sata=off,graphics=off{backend}",
                capabilities.machine
            ),
        )
        // Guest memory is then none of what a dump would hold (madvise(2), `MADV_DONTDUMP`), whoever raises the limit again.
        .unseen("-machine", "dump-guest-core=off")
        .own(
            "-accel",
            if accel == Accel::Kvm {
                "kvm".to_owned()
            } else {
                format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}")
            },
        )
        .pair("-cpu", accel.cpu())
        .pair("-smp", launch.vcpus.to_string())
        .pair("-m", format!("{}M", launch.memory_mib))
        .own("-kernel", launch.kernel.as_str())
        .own("-initrd", launch.initrd.as_str())
        .pair("-append", cmdline(accel, launch))
        .own(
            "-add-fd",
            format!("fd={},set={CONFIG_SET}", number(&fds.config)),
        )
        .own(
            "-add-fd",
            format!("fd={},set={SERIAL_SET}", number(&fds.serial)),
        )
        .pair(
            "-chardev",
            format!("file,id=serial,append=on,path=/dev/fdset/{SERIAL_SET}"),
        )
        .pair("-serial", "chardev:serial")
        .own("-chardev", format!("socket,id=qmp,fd={}", number(&fds.qmp)))
        .pair("-mon", "chardev=qmp,mode=control")
        .own("-blockdev", root_file.to_string())
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
        .own(
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
        .pair("-device", "virtio-rng-pci,rng=rng")
        // Another one for each VM, copies too: a kernel that has the driver reseeds its generator when it changes (QEMU's
        // docs/specs/vmgenid). The agent does so in any case.
        .pair("-device", "vmgenid,guid=auto");
    if let Some(memory) = memory {
        args.own("-object", memory.to_string());
    }
    if matches!(launch.memory, Memory::Restored(_)) {
        args.unseen("-incoming", "defer");
    }
    Argv {
        args: args.0,
        shape: crate::snapshot::hex(args.1.finalize()),
    }
}

/// The raw format on top of the node `<name>-file`.
fn raw_node(name: &str) -> serde_json::Value {
    json!({ "node-name": name, "driver": "raw", "file": format!("{name}-file"), "read-only": true })
}

/// The arguments, and the digest of those that are the same for every VM of one shape.
#[derive(Default)]
struct Args(Vec<String>, Sha256);

impl Args {
    fn pair(&mut self, option: &str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        self.1.update(format!("{option}\0{value}\0"));
        self.0.extend([option.to_owned(), value]);
        self
    }

    /// An option whose value is this VM's own.
    fn own(&mut self, option: &str, value: impl Into<String>) -> &mut Self {
        self.1.update(format!("{option}\0"));
        self.0.extend([option.to_owned(), value.into()]);
        self
    }

    /// An option that is none of the guest's: what it says makes no other machine.
    fn unseen(&mut self, option: &str, value: &str) -> &mut Self {
        self.0.extend([option, value].map(str::to_owned));
        self
    }

    fn words(&mut self, words: &str) -> &mut Self {
        self.1.update(words);
        self.0.extend(words.split(' ').map(str::to_owned));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config_drive, log::BoundedLog};
    use camino::Utf8Path;
    use vestibule_api::{ids::MachineId, mux::StreamKey};

    /// Of a new VM that keeps everything in `dir`.
    fn of(dir: &Utf8Path, vcpus: u32, memory: Memory) -> Argv {
        let machine_id = MachineId::generate();
        let log = |name: &str| BoundedLog::create(&dir.join(name), 1024).unwrap();
        let descriptor = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let capabilities = Capabilities {
            driver: Accel::Tcg.name().to_owned(),
            version: "7.2.22".to_owned(),
            because: String::new(),
            machine: "pc-q35-7.2".to_owned(),
            pause: true,
            snapshot: true,
            read_only_memory: false,
        };
        let launch = Launch {
            machine_id,
            memory_mib: 256,
            vcpus,
            vm_dir: dir.to_owned(),
            root: dir.join("root.ext4"),
            kernel: dir.join("vmlinuz"),
            vmlinux: None,
            initrd: dir.join("initrd"),
            cmdline: "quiet".to_owned(),
            config: config_drive::make(machine_id, 1, &StreamKey::generate()).unwrap(),
            image_digest: "a".repeat(64).parse().unwrap(),
            agent_build: "b".repeat(64),
            memory,
            spawned: Default::default(),
            jail: None,
            standing: None,
            console: log("console"),
            vmm_log: log("vmm"),
        };
        let fds = Descriptors {
            qmp: descriptor(),
            stream: descriptor(),
            serial: descriptor(),
            config: descriptor(),
        };
        argv(&capabilities, &launch, &fds)
    }

    #[test]
    fn guest_memory_is_left_out_of_dumps_and_a_machine_is_told_by_its_shape() {
        let (one, two) = (
            camino_tempfile::tempdir().unwrap(),
            camino_tempfile::tempdir().unwrap(),
        );
        let first = of(one.path(), 1, Memory::Own);
        let mut pairs = first.args.iter().zip(first.args.iter().skip(1));
        assert!(
            pairs.any(|(option, value)| option == "-machine" && value == "dump-guest-core=off")
        );
        assert_eq!(first.shape, of(two.path(), 1, Memory::Own).shape);
        assert_ne!(first.shape, of(two.path(), 2, Memory::Own).shape);
    }

    #[test]
    fn what_is_none_of_the_guests_makes_no_other_machine() {
        let shape = |args: Args| args.1.finalize();
        let (mut with, mut without, mut other) = <(Args, Args, Args)>::default();
        with.pair("-smp", "1")
            .unseen("-machine", "dump-guest-core=off");
        without.pair("-smp", "1");
        other
            .pair("-smp", "1")
            .pair("-machine", "dump-guest-core=off");
        assert_eq!(with.0, other.0);
        let same = shape(without);
        assert_eq!(shape(with), same);
        assert_ne!(shape(other), same);
    }
}
