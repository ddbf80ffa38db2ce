//! Whether KVM works here, found out by running guest instructions.
//!
//! A `/dev/kvm` that opens proves nothing: under some hypervisors a VM is created, says *running*, and each guest
//! instruction is interpreted in 6 µs until one fails that the interpreter does not know. So the probe runs a guest in
//! 64-bit mode that uses an SSE register and counts down a loop, and times it.
use crate::kept;
use camino::Utf8Path;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::{
    fmt,
    sync::mpsc,
    time::{Duration, Instant},
};

/// A short loop first: where each instruction is interpreted it takes a quarter of a second, elsewhere microseconds.
const SHORT: u32 = 20_000;
const SHORT_LIMIT: Duration = Duration::from_millis(100);
const LONG: u32 = 1_000_000;
const LONG_LIMIT: Duration = Duration::from_millis(500);
/// The best of so many counts: the machine may be busy.
const ATTEMPTS: u32 = 3;
/// A guest that hangs is left behind on its thread after so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(
    tag = "kvm",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum KvmVerdict {
    /// A million iterations in so many microseconds.
    Usable { micros: u64 },
    /// There is no `/dev/kvm`.
    Absent,
    /// It is there and this user may not open it.
    NoPermission,
    /// The host gives no VM to anybody, or not now: the error, and at what.
    Refused { errno: i32, what: String },
    /// It opens and cannot run a guest.
    Broken { what: String },
    /// It runs guests, each instruction by hand.
    TooSlow { iterations: u32, micros: u64 },
}

impl KvmVerdict {
    /// Whether a VM should use KVM.
    pub fn usable(&self) -> bool {
        matches!(self, Self::Usable { .. })
    }

    /// What to do about it; nothing where it works.
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::Usable { .. } => None,
            Self::Absent => Some(
                "for speed, run on hardware with virtualisation enabled in its firmware, or in a VM with nested virtualisation, and load kvm_intel or kvm_amd",
            ),
            Self::NoPermission => {
                Some("for speed, add this user to the group `kvm` and sign in again")
            }
            Self::Refused { errno, .. } => Some(refused_fix(*errno)),
            Self::Broken { .. } | Self::TooSlow { .. } => Some(
                "this /dev/kvm has no hardware behind it (PVM and its like): it opens, a VM says that it runs, and Linux does not get far; for speed, use a host with hardware or nested virtualisation",
            ),
        }
    }
}

/// What to do about an error (ioctl(2) on /dev/kvm, the kernel's Documentation/virt/kvm/api.rst).
fn refused_fix(errno: i32) -> &'static str {
    match errno {
        libc::ENODEV | libc::ENXIO => {
            "for speed, load kvm_intel or kvm_amd (`modprobe`), with virtualisation enabled in the firmware: /dev/kvm has no driver behind it"
        }
        libc::EPERM => {
            "for speed, let this container or unit use the device: `--device /dev/kvm`, or `DeviceAllow=/dev/kvm rw`"
        }
        libc::EBUSY => {
            "for speed, end the other hypervisor that has the processor's virtualisation (VirtualBox, VMware), or unload its module"
        }
        libc::EMFILE | libc::ENFILE => {
            "raise the limit of open files (`LimitNOFILE=`, `ulimit -n`, `fs.file-max`): nothing is known of KVM without a descriptor"
        }
        libc::ENOMEM => "free some memory: nothing is known of KVM without a VM",
        _ => "see in the kernel's log (`dmesg`) why KVM makes no VM",
    }
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable { micros } => {
                write!(f, "KVM runs guests: {LONG} iterations in {micros} µs")
            }
            Self::Absent => f.write_str("there is no /dev/kvm"),
            Self::NoPermission => f.write_str("/dev/kvm is there and this user may not open it"),
            Self::Refused { what, .. } => write!(f, "/dev/kvm is there and gives no VM: {what}"),
            Self::Broken { what } => write!(f, "/dev/kvm opens and cannot run a guest: {what}"),
            Self::TooSlow { iterations, micros } => write!(
                f,
                "/dev/kvm runs guests by interpreting them: {iterations} iterations took {micros} µs"
            ),
        }
    }
}

/// In the directory for what was found out.
const KEPT: &str = "kvm.json";

/// What [`probe`] says. Where it worked before since this host was booted, that is kept in `cache_dir`: a guest of its own that
/// fails says so soon enough.
pub fn probe_once(cache_dir: Option<&Utf8Path>) -> KvmVerdict {
    let boot = kept::boot_id().ok();
    let of = boot.map(|boot| (boot, rustix::process::geteuid().as_raw()));
    let found = kept::find(cache_dir, KEPT, of.as_ref(), || {
        let verdict = probe();
        if verdict.usable() {
            Ok(verdict)
        } else {
            Err(verdict)
        }
    });
    found.unwrap_or_else(|verdict| verdict)
}

/// Probes `/dev/kvm`. Blocks for some milliseconds where it works, at most [`PATIENCE`] where it hangs.
pub fn probe() -> KvmVerdict {
    let there = rustix::fs::access("/dev/kvm", rustix::fs::Access::EXISTS);
    if there == Err(rustix::io::Errno::NOENT) {
        return KvmVerdict::Absent;
    }
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name(String::from("kvm probe"));
    let started = thread.spawn(move || tell.send(run().unwrap_or_else(|verdict| verdict)));
    if let Err(err) = started {
        return broken(err.to_string());
    }
    told.recv_timeout(PATIENCE)
        .unwrap_or_else(|_| broken(format!("the guest did not halt within {PATIENCE:?}")))
}

fn broken(what: impl Into<String>) -> KvmVerdict {
    KvmVerdict::Broken { what: what.into() }
}

/// What it means that KVM does not give what a VM is made of.
fn refused(what: &str) -> impl Fn(kvm_ioctls::Error) -> KvmVerdict {
    move |err| match err.errno() {
        libc::EACCES => KvmVerdict::NoPermission,
        errno => KvmVerdict::Refused {
            errno,
            what: format!("{what}: {err}"),
        },
    }
}

impl From<String> for KvmVerdict {
    /// What a guest did not do.
    fn from(what: String) -> Self {
        broken(what)
    }
}

fn run() -> Result<KvmVerdict, KvmVerdict> {
    let kvm = Kvm::new().map_err(refused("open it"))?;
    let mut guest = Guest::new(&kvm)?;
    for (iterations, limit) in [(SHORT, SHORT_LIMIT), (LONG, LONG_LIMIT)] {
        let mut best = Duration::MAX;
        for _ in 0..ATTEMPTS {
            best = best.min(guest.count_down(iterations)?);
            if best <= limit {
                break;
            }
        }
        let micros = u64::try_from(best.as_micros()).unwrap_or(u64::MAX);
        if best > limit {
            return Ok(KvmVerdict::TooSlow { iterations, micros });
        }
        if iterations == LONG {
            return Ok(KvmVerdict::Usable { micros });
        }
    }
    Err(broken("nothing was counted"))
}

const PAGE: usize = 0x1000;
/// Guest-physical: page tables at 0, 0x1000, 0x2000; code at 0x3000.
const CODE: usize = 3 * PAGE;

#[repr(C, align(4096))]
struct Memory([u8; 4 * PAGE]);

/// One vCPU in 64-bit mode over four pages of memory.
struct Guest {
    vcpu: VcpuFd,
    memory: Box<Memory>,
    _vm: VmFd,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, KvmVerdict> {
        let vm = kvm.create_vm().map_err(refused("create a VM"))?;
        let memory = Box::new(identity_map());
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: size_of::<Memory>() as u64,
            userspace_addr: std::ptr::from_ref(memory.as_ref()) as u64,
        };
        // SAFETY: the region is exactly the page-aligned allocation of `memory`, which lives in the same struct as the
        // VM and is dropped after its vCPU.
        #[expect(unsafe_code, reason = "KVM is given memory by address")]
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("give it memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| format!("read the CPU's features: {e}"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|e| format!("set the CPU's features: {e}"))?;
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|e| format!("read registers: {e}"))?;
        long_mode(&mut sregs);
        vcpu.set_sregs(&sregs)
            .map_err(|e| format!("enter 64-bit mode: {e}"))?;
        Ok(Self {
            vcpu,
            memory,
            _vm: vm,
        })
    }

    /// Runs the loop to its end and returns how long that took.
    fn count_down(&mut self, iterations: u32) -> Result<Duration, String> {
        let code = program(iterations);
        self.memory.0[CODE..CODE + code.len()].copy_from_slice(&code);
        let mut regs = self
            .vcpu
            .get_regs()
            .map_err(|e| format!("read registers: {e}"))?;
        regs.rip = CODE as u64;
        regs.rflags = 2;
        self.vcpu
            .set_regs(&regs)
            .map_err(|e| format!("set registers: {e}"))?;
        let begun = Instant::now();
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => {}
            Ok(other) => return Err(format!("the guest stopped with {other:?}")),
            Err(err) => return Err(format!("run it: {err}")),
        }
        let took = begun.elapsed();
        let left = self
            .vcpu
            .get_regs()
            .map_err(|e| format!("read registers: {e}"))?
            .rcx;
        if left == 0 {
            Ok(took)
        } else {
            Err(format!("the guest halted with {left} iterations left"))
        }
    }
}

/// Page tables that map the first 2 MiB onto themselves.
fn identity_map() -> Memory {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut memory = Memory([0; 4 * PAGE]);
    let mut entry = |at: usize, value: u64| {
        memory.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    entry(0, PAGE as u64 | PRESENT_WRITABLE);
    entry(PAGE, (2 * PAGE as u64) | PRESENT_WRITABLE);
    entry(2 * PAGE, PRESENT_WRITABLE | LARGE);
    memory
}

/// `pxor xmm0,xmm0; addps xmm0,xmm0; mov ecx,N; loop: dec ecx; jnz loop; hlt`
fn program(iterations: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0x0f, 0xef, 0xc0, 0x0f, 0x58, 0xc0, 0xb9];
    code.extend_from_slice(&iterations.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xf4]);
    code
}

/// 64-bit mode with paging and SSE (AMD64 manual, volume 2, chapters 3 and 11).
fn long_mode(sregs: &mut kvm_bindings::kvm_sregs) {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr3 = 0;
    sregs.cr4 = (1 << 5) | (1 << 9) | (1 << 10); // PAE, OSFXSR, OSXMMEXCPT
    sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    sregs.efer = (1 << 8) | (1 << 10); // LME, LMA
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_and_says_something() {
        let begun = Instant::now();
        let verdict = probe();
        println!("{verdict} ({:?})", begun.elapsed());
        assert!(begun.elapsed() < PATIENCE + Duration::from_secs(2));
        assert!(!verdict.to_string().is_empty());
        assert_eq!(verdict.usable(), verdict.fix().is_none());
    }

    #[test]
    fn each_error_has_words_of_its_own() {
        let verdict = |errno| refused("create a VM")(kvm_ioctls::Error::new(errno));
        let cases = [
            (libc::EACCES, "the group `kvm`"),
            (libc::EPERM, "--device /dev/kvm"),
            (libc::ENODEV, "load kvm_intel or kvm_amd"),
            (libc::ENXIO, "load kvm_intel or kvm_amd"),
            (libc::EBUSY, "the other hypervisor"),
            (libc::EMFILE, "open files"),
            (libc::ENFILE, "open files"),
            (libc::ENOMEM, "free some memory"),
            (libc::EINVAL, "dmesg"),
        ];
        for (errno, words) in cases {
            let verdict = verdict(errno);
            let fix = verdict.fix().unwrap();
            assert!(fix.contains(words), "{verdict}: {fix}");
            assert!(
                !verdict.usable() && !fix.contains("PVM"),
                "{verdict}: {fix}"
            );
        }
        // Only a guest that ran tells of the hardware.
        let broken = broken("the guest stopped with InternalError");
        assert!(broken.fix().unwrap().contains("PVM"));
    }
}
