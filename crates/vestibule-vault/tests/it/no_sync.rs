//! A thread whose fsync(2) and fdatasync(2) fail, by a seccomp filter of its own: everything else is the real kernel.
use rustix::thread::set_no_new_privs;

/// What they fail with: EIO.
pub(crate) const ERRNO: i32 = libc::EIO;

/// Does `work` on such a thread.
pub(crate) fn during<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            forbid();
            work()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// For the rest of this thread's life.
fn forbid() {
    // Without it only root may filter (seccomp(2)).
    set_no_new_privs(true).unwrap();
    let step = |code: u32, jt, jf, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt,
        jf,
        k,
    };
    let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let number = |call: libc::c_long| u32::try_from(call).unwrap();
    let errno = libc::SECCOMP_RET_ERRNO | u32::try_from(ERRNO).unwrap();
    let mut steps = [
        // The number of the call stands first in seccomp_data.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(jump, 1, 0, number(libc::SYS_fsync)),
        step(jump, 0, 1, number(libc::SYS_fdatasync)),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, errno),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(steps.len()).unwrap(),
        filter: steps.as_mut_ptr(),
    };
    let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
    #[expect(unsafe_code, reason = "rustix has no call for a filter")]
    // SAFETY: `program` points to `steps`, which outlive the call; the kernel copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}
