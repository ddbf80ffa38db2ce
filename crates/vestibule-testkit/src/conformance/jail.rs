//! What a VMM is kept apart from the host by: seen from outside, and, where it has a root and a user of its own, from a process that
//! is put beside it. A host may have less to give, and a case says so; where a jail is required, less is a failure.
use super::{
    Outcome, Suite,
    vm::{Running, Vm, soon},
};
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use std::{
    collections::BTreeSet,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    process::Stdio,
    time::Duration,
};
use tokio::{net::TcpListener, process::Command, sync::watch};
use vestibule_api::{machine::DriverChoice, stream::VSOCK_LISTENS_PORT};

/// Static, with the programs that the probe needs; the nested machine has it.
const BUSYBOX: &str = "/bin/busybox";
/// Bytes of a flood of the VMM's log, its line, and what comes after it.
const FLOOD: u64 = 16 << 20;
const LINE: &str = "anomaly_of_a_device";
const LAST: &str = "the_last_words";
const NAMESPACES: [&str; 5] = ["mnt", "net", "pid", "ipc", "uts"];

fn status(pid: u32, name: &str) -> Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    Ok(line
        .with_context(|| format!("`{name}` of process {pid}"))?
        .trim()
        .to_owned())
}

fn namespace(pid: u32, name: &str) -> Result<String> {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// The user that the VMM runs as, where it is not the runner's.
fn user(pid: u32) -> Result<Option<u32>> {
    let line = status(pid, "Uid:")?;
    let uid: u32 = line.split_whitespace().next().context("a uid")?.parse()?;
    Ok((uid != rustix::process::geteuid().as_raw()).then_some(uid))
}

/// A case that asks for what is not there.
pub(super) fn lacks(required: bool, what: &str) -> Result<Outcome> {
    ensure!(!required, "{what}");
    Ok(Outcome::Skipped(what.to_owned()))
}

/// All that is asked of two copies.
pub(super) async fn all(suite: &mut Suite, (vm, one): (&Vm, &Running), other: (&Vm, &Running)) {
    let (home, required) = (suite.setup.home.clone(), suite.setup.jail_required);
    suite
        .case(
            "jail: apart from host and others",
            apart(one, other.1, required),
        )
        .await;
    suite.case("jail: limits", limits(vm, one, required)).await;
    suite.case("jail: no core dumps", dumps(one)).await;
    suite
        .case(
            "jail: nothing is reached from inside",
            inside(one, other, &home, required),
        )
        .await;
    suite
        .case(
            "jail: floods of processes, memory, log, disk",
            floods(vm, one, required),
        )
        .await;
}

/// Two VMs: each has what keeps it apart from the host and from the other.
async fn apart(one: &Running, two: &Running, required: bool) -> Result<String> {
    let (one, two) = (one.vmm().await?, two.vmm().await?);
    if !rustix::process::geteuid().is_root() {
        ensure!(!required, "only root has jails");
        ensure!(status(one, "NoNewPrivs:")? == "1", "it can get privileges");
        return Ok(String::from("without root: Landlock and seccomp alone"));
    }
    for pid in [one, two] {
        ensure!(
            status(pid, "CapEff:")? == "0000000000000000",
            "it has capabilities"
        );
        ensure!(
            status(pid, "Seccomp:")? == "2",
            "it has no filter of system calls"
        );
        for name in NAMESPACES {
            let own = namespace(pid, name)?;
            ensure!(
                own != namespace(std::process::id(), name)?,
                "`{name}` is the host's"
            );
        }
    }
    for name in NAMESPACES {
        ensure!(
            namespace(one, name)? != namespace(two, name)?,
            "`{name}` is shared"
        );
    }
    match (user(one)?, user(two)?) {
        (None, None) => {
            ensure!(!required, "both are root's");
            Ok(String::from(
                "root's user without capabilities, and Landlock",
            ))
        }
        (Some(first), Some(second)) => {
            ensure!(first != second, "both are the user {first}");
            Ok(format!("users {first} and {second}"))
        }
        (first, second) => bail!("one is jailed alone: {first:?} and {second:?}"),
    }
}

/// Neither the runner nor the VMM is dumped when it crashes; of QEMU, guest memory is besides left out of any dump.
pub(super) async fn dumps(running: &Running) -> Result<String> {
    let vmm = running.vmm().await?;
    let runner = running.process.id().context("it runs")?;
    for pid in [runner, vmm] {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let line = limits.lines().find(|line| line.starts_with("Max core"));
        let words: Vec<_> = line.context("a limit")?.split_whitespace().collect();
        let none = |limit: &&str| ["0", "1"].contains(limit);
        ensure!(words.iter().skip(4).take(2).all(none), "{pid}: {words:?}");
    }
    let largest = largest_mapping(vmm)?;
    if !running.view().await?.driver.starts_with("qemu") {
        return Ok(String::from("the limit alone"));
    }
    ensure!(
        largest.contains(" dd"),
        "guest memory would be dumped: {largest}"
    );
    Ok(largest)
}

/// `VmFlags` (proc_pid_smaps(5)) of the largest mapping that nothing can be executed in: the guest's memory.
fn largest_mapping(pid: u32) -> Result<String> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut size, mut largest) = (0, (0, ""));
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse()?;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && size > largest.0
            && !flags.split(' ').any(|flag| flag == "ex")
        {
            largest = (size, flags);
        }
    }
    Ok(format!("{} MiB:{}", largest.0 >> 10, largest.1))
}

/// Debian's `nobody`.
const NOBODY: u32 = 65534;

/// A VM whose runner is nobody's: Landlock and the VMM's own filters are all that there is, and it boots and answers under them.
pub(super) async fn without_root(vm: Result<Vm>, required: bool) -> Result<Outcome> {
    let mut vm = vm?;
    if !rustix::process::geteuid().is_root() {
        return lacks(required, "the whole suite runs without root");
    }
    let root = Utf8Path::new(&vm.spec.image_dir).join("root.ext4");
    let mut needs = vec!["-r", root.as_str(), "-a", "-x", vm.program()];
    if vm.spec.driver == DriverChoice::Firecracker {
        needs.extend(["-a", "-w", "/dev/kvm"]);
    }
    let can = Command::new("test")
        .args(&needs)
        .uid(NOBODY)
        .gid(NOBODY)
        .status()
        .await?;
    if !can.success() {
        let words = format!("for the user {NOBODY}, `test {}` fails", needs.join(" "));
        return lacks(required, &words);
    }
    let home = camino_tempfile::tempdir()?;
    vm.of(NOBODY, home.path())?;
    let running = vm.up().await?;
    let vmm = running.vmm().await?;
    ensure!(user(vmm)? == Some(NOBODY), "the VMM is not nobody's");
    ensure!(status(vmm, "NoNewPrivs:")? == "1", "it can get privileges");
    ensure!(
        status(vmm, "Seccomp:")? == "2",
        "it has no filter of system calls"
    );
    let said = running.exec("cat /etc/hostname").await?;
    ensure!(said.stdout.starts_with("vm-"), "{said:?}");
    running.stop().await?;
    running.ended().await?;
    vm.nothing_left(Some(vmm))?;
    let machine: serde_json::Value = vm.json("machine.json")?;
    let (version, uid) = (&machine["jail"]["landlock"], &machine["jail"]["uid"]);
    ensure!(uid.is_null(), "{machine}");
    Ok(Outcome::Passed(format!("Landlock: {version}")))
}

/// The cgroup of its own that a VMM is in.
fn group(pid: u32) -> Result<Option<Utf8PathBuf>> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = group.filter(|group| group.contains("vestibule/vm-"));
    Ok(own.map(|group| Utf8Path::new("/sys/fs/cgroup").join(group)))
}

const NO_CGROUP: &str = "the VMM has no cgroup v2 of its own";

/// The cgroup that a VMM is in, and its limits.
async fn limits(vm: &Vm, running: &Running, required: bool) -> Result<Outcome> {
    let Some(directory) = group(running.vmm().await?)? else {
        return lacks(required, NO_CGROUP);
    };
    let read = |name: &str| std::fs::read_to_string(directory.join(name));
    let bytes: u64 = read("memory.max")?.trim().parse()?;
    let guest = u64::from(vm.spec.memory_mib) << 20;
    ensure!(
        (guest..guest + (2048 << 20)).contains(&bytes),
        "memory.max is {bytes}"
    );
    let pids: u32 = read("pids.max")?.trim().parse()?;
    let cpu = read("cpu.max")?;
    ensure!(!cpu.starts_with("max"), "cpu.max is {cpu}");
    Ok(Outcome::Passed(format!(
        "memory {} MiB, {pids} processes, CPU {}",
        bytes >> 20,
        cpu.trim()
    )))
}

/// What nobody may reach from beside a VMM: the host's, and the other VM's.
struct Targets {
    files: Vec<Utf8PathBuf>,
    /// Busybox connects to none that is in a file, and need not: none is to be seen.
    sockets: Vec<Utf8PathBuf>,
    /// A service on the host's loopback.
    port: u16,
    pids: Vec<u32>,
}

impl Targets {
    /// A script that says a line for each file, socket and service that it reaches.
    fn paths(&self, busybox: &str) -> String {
        let paths = self.files.iter().chain(&self.sockets);
        let words: Vec<_> = paths.map(|path| path.to_string()).collect();
        format!(
            "for path in {}; do
               {busybox} cat $path >/dev/null 2>&1 && echo \"read $path\"
               {busybox} test -e $path && echo \"there is $path\"
             done
             {busybox} nc -w 2 127.0.0.1 {} </dev/null >/dev/null 2>&1 && echo connected\n",
            quoted(&words),
            self.port
        )
    }

    /// A script that says a line for each process that it can signal.
    fn signals(&self) -> String {
        let pids: Vec<_> = self.pids.iter().map(u32::to_string).collect();
        format!(
            "for pid in {}; do kill -0 $pid 2>/dev/null && echo \"signalled $pid\"; done\n",
            pids.join(" ")
        )
    }

    /// What both say where they reach everything.
    fn everything(&self) -> BTreeSet<String> {
        let read = self.files.iter().map(|path| format!("read {path}"));
        let paths = self.files.iter().chain(&self.sockets);
        let there = paths.map(|path| format!("there is {path}"));
        let signalled = self.pids.iter().map(|pid| format!("signalled {pid}"));
        let all = read.chain(there).chain(signalled);
        all.chain([String::from("connected")]).collect()
    }
}

/// Every file and every socket below a directory.
fn below(directory: &Utf8Path) -> Result<(Vec<Utf8PathBuf>, Vec<Utf8PathBuf>)> {
    let (mut files, mut sockets) = (Vec::new(), Vec::new());
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in next.read_dir_utf8()? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.into_path());
            } else if kind.is_file() {
                files.push(entry.into_path());
            } else if kind.is_socket() {
                sockets.push(entry.into_path());
            }
        }
    }
    Ok((files, sockets))
}

/// The path may be longer than a socket's address.
fn connect(socket: &Utf8Path) -> Result<UnixStream> {
    let path = rustix::fs::open(socket.as_std_path(), OFlags::PATH, Mode::empty())?;
    let short = format!("/proc/self/fd/{}", path.as_raw_fd());
    Ok(UnixStream::connect(short)?)
}

/// Asks from inside: a process with the VMM's user, root and namespaces. The host is asked the same before, and reaches all of it.
async fn inside(
    running: &Running,
    (vm, other): (&Vm, &Running),
    home: &Utf8Path,
    required: bool,
) -> Result<Outcome> {
    let pid = running.vmm().await?;
    let Some(uid) = user(pid)? else {
        return lacks(
            required,
            "the VMM has no root of its own; unit tests of `jail` ask what Landlock leaves",
        );
    };
    let service = TcpListener::bind("127.0.0.1:0").await?;
    let port = service.local_addr()?.port();
    let (came, visits) = watch::channel(0);
    let serving = tokio::spawn(async move {
        // Whoever comes is let go.
        while service.accept().await.is_ok() {
            came.send_modify(|count| *count += 1);
        }
    });
    let (mut files, mut sockets) = below(Utf8Path::new(&vm.spec.vm_dir))?;
    ensure!(
        files.len() > 3 && sockets.len() > 3,
        "{files:?} {sockets:?}"
    );
    // Whoever connects to this one says that the guest listens again.
    let word = format!("_{VSOCK_LISTENS_PORT}");
    for socket in sockets
        .iter()
        .filter(|path| !path.as_str().ends_with(&word))
    {
        connect(socket).with_context(|| format!("connect to `{socket}`"))?;
    }
    let secret = home.join("secret");
    std::fs::write(&secret, "the host's secret")?;
    files.extend([secret, "/proc/1/environ".into()]);
    let socket = home.join("secret.sock");
    let _listener = UnixListener::bind(&socket)?;
    sockets.push(socket);
    let runner = |of: &Running| of.process.id().context("it runs");
    let targets = Targets {
        files,
        sockets,
        port,
        pids: vec![
            std::process::id(),
            runner(running)?,
            runner(other)?,
            other.vmm().await?,
        ],
    };
    let script = format!("{}{}", targets.paths(BUSYBOX), targets.signals());
    let host: Vec<_> = [BUSYBOX, "sh", "-c", &script].map(str::to_owned).into();
    let host = output_of(&host).await?;
    let reached: BTreeSet<_> = host.lines().map(str::to_owned).collect();
    ensure!(
        reached == targets.everything() && *visits.borrow() == 1,
        "the host itself reaches only {reached:?}"
    );

    put(pid).context("put a program into the jail")?;
    // Its number in its own namespace is the last (proc_pid_status(5)).
    let numbers = status(pid, "NSpid:")?;
    let own = numbers.split_whitespace().next_back().context("a number")?;
    let up = "../".repeat(20);
    let script = format!(
        "echo \"user $(/busybox id -u) $(/busybox id -g)\"
         /busybox head -c 4096 /root >/dev/null && echo 'read its own disk'
         kill -0 {own} && echo 'signalled its own VMM'
         {}
         for path in /etc/passwd {up}etc/passwd /dev/mem /dev/vda; do
           /busybox cat $path >/dev/null 2>&1 && echo \"read $path\"; /busybox test -e $path && echo \"there is $path\"; done
         for name in root vmlinux initrd memory config; do
           (echo x >>/$name) 2>/dev/null && echo \"wrote $name\"; done
         /busybox mknod /disk b 254 0 2>/dev/null && echo 'made a device'
         /busybox mount -t tmpfs x /run 2>/dev/null && echo mounted
         /busybox chroot / /busybox true 2>/dev/null && echo 'changed its root'
         echo \"sees $(/busybox ls / | /busybox tr '\\n' ' ')\"",
        targets.paths("/busybox")
    );
    let inside = output_of(&entering(pid, uid, Some("-p"), &script)).await;
    // A process's number means something in its namespace alone. In the host's it is the user that keeps the VM from others.
    let script = format!(
        "kill -0 {pid} && echo 'signalled its own VMM'\n{}true",
        targets.signals()
    );
    let among = output_of(&entering(pid, uid, None, &script)).await;
    std::fs::remove_file(format!("/proc/{pid}/root/busybox"))?;
    let (inside, among) = (inside?, among?);
    ensure!(among.trim() == "signalled its own VMM", "{among}");
    let lines: Vec<_> = inside.lines().collect();
    let [user, own @ .., sees] = lines.as_slice() else {
        bail!("{inside}")
    };
    ensure!(*user == format!("user {uid} {uid}"), "{inside}");
    ensure!(
        own == ["read its own disk", "signalled its own VMM"],
        "{own:?}"
    );
    ensure!(
        sees.starts_with("sees ") && !sees.contains("etc"),
        "{inside}"
    );
    serving.abort();
    ensure!(
        *visits.borrow() == 1,
        "somebody connected to the host's loopback"
    );
    Ok(Outcome::Passed(format!(
        "none of {} files, {} sockets and {} processes; it {sees}",
        targets.files.len(),
        targets.sockets.len(),
        targets.pids.len()
    )))
}

/// As many processes, as much memory, as long a log and as many files as anybody in the VM's group would like: the limits hold, and
/// neither its VM nor the host is the worse for it.
async fn floods(vm: &Vm, running: &Running, required: bool) -> Result<Outcome> {
    let pid = running.vmm().await?;
    let Some(uid) = user(pid)? else {
        return lacks(required, "the VMM has no user of its own");
    };
    let Some(group) = group(pid)? else {
        return lacks(required, NO_CGROUP);
    };
    put(pid).context("put a program into the jail")?;
    let flood = async |script: &str| -> Result<String> {
        // Of all that is in the group, this is what the kernel ends first.
        let words = quoted(&entering(pid, uid, Some("-p"), script));
        let script = format!(
            "echo 1000 >/proc/self/oom_score_adj; echo $$ >{group}/cgroup.procs; exec {words}"
        );
        let output = Command::new(BUSYBOX)
            .args(["sh", "-c", &script])
            .stdin(Stdio::null())
            .output()
            .await?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let count = |file: &str, name: &str| -> Result<u64> {
        let text = std::fs::read_to_string(format!("{group}/{file}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.with_context(|| text.clone())?.trim().parse()?)
    };
    let said = flood("n=0; while [ $n -lt 300 ]; do /busybox sleep 3 & n=$((n + 1)); done").await?;
    let refused = count("pids.events", "max ")?;
    ensure!(
        said.contains("fork") && refused > 0,
        "300 processes were made: {said}"
    );
    // What comes through a pipe, `tail` keeps until it has all of it. The snapshot's memory is long, and quickly read.
    let said = flood(
        "/busybox cat /memory /memory /memory /memory | /busybox tail -c 900m | /busybox wc -c",
    )
    .await?;
    let ended = count("memory.events", "oom_kill ")?;
    ensure!(ended > 0, "900 MiB were had: {said}");
    // The VMM's log is a FIFO of its user's: whoever has got into the VMM may say as much as it likes.
    let said = flood(&format!(
        "/busybox yes {LINE} | /busybox head -c {FLOOD} >/log; echo {LAST} >/log"
    ))
    .await?;
    let log = soon("the log to end with it", async {
        loop {
            let (bytes, ended) = kept(vm)?;
            if ended {
                return anyhow::Ok(bytes);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .with_context(|| said.clone())??;
    ensure!(log <= FLOOD / 64, "{log} bytes are kept of {FLOOD}");
    // It can add no file to those that it has, and what it has is only so long.
    let script = "for directory in $(/busybox find / -type d 2>/dev/null); do
          (echo x >$directory/new) 2>/dev/null && echo \"made a file in $directory\"
        done; (echo x >>/metrics) && echo 'wrote its counters'";
    let made = output_of(&entering(pid, uid, Some("-p"), script)).await?;
    ensure!(made.trim() == "wrote its counters", "{made}");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let longest = limits
        .lines()
        .find(|line| line.starts_with("Max file size"));
    ensure!(
        longest.is_some_and(|line| !line.contains("unlimited")),
        "{limits}"
    );
    ensure!(
        running.view().await?.vmm_pid == Some(pid) && super::vm::alive(pid),
        "the VM is gone"
    );
    Ok(Outcome::Passed(format!(
        "{refused} forks were refused, {ended} process ended that took memory, and {log} bytes are kept of a log of {FLOOD}"
    )))
}

/// Bytes that the files of the VMM's log have, and whether the flood's last words are among them.
fn kept(vm: &Vm) -> Result<(u64, bool)> {
    let (mut bytes, mut ended) = (0, false);
    for entry in Utf8Path::new(&vm.spec.vm_dir).read_dir_utf8()? {
        let entry = entry?;
        if entry.file_name().starts_with("vmm.log") {
            let text = std::fs::read(entry.path())?;
            bytes += text.len() as u64;
            ended |= text
                .windows(LAST.len())
                .any(|words| words == LAST.as_bytes());
        }
    }
    Ok((bytes, ended))
}

/// Puts the programs of the probe where the VMM's root is, and what shells want and a VMM has not: `/dev/null`.
fn put(pid: u32) -> Result<()> {
    let root = format!("/proc/{pid}/root");
    let mode = std::fs::Permissions::from_mode;
    let (program, null) = (format!("{root}/busybox"), format!("{root}/dev/null"));
    std::fs::write(&program, std::fs::read(BUSYBOX)?)?;
    std::fs::set_permissions(program, mode(0o755))?;
    if !std::fs::exists(&null)? {
        let device = rustix::fs::makedev(1, 3);
        mknodat(CWD, &null, FileType::CharacterDevice, Mode::empty(), device)?;
        std::fs::set_permissions(null, mode(0o666))?;
    }
    Ok(())
}

/// The words that put a program beside the VMM and run a script there; with `-p` in its pid namespace, too.
fn entering(pid: u32, uid: u32, processes: Option<&str>, script: &str) -> Vec<String> {
    let (pid, uid) = (pid.to_string(), uid.to_string());
    let before = [BUSYBOX, "nsenter", "-t", &pid, "-m", "-n", "-i", "-u"];
    let after = ["-S", &uid, "-G", &uid, "/busybox", "sh", "-c", script];
    let words = before.into_iter().chain(processes).chain(after);
    words.map(str::to_owned).collect()
}

fn quoted(words: &[String]) -> String {
    let quote = |word: &String| format!("'{}'", word.replace('\'', "'\\''"));
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// What a program says that ends well.
async fn output_of(words: &[String]) -> Result<String> {
    let (program, arguments) = words.split_first().context("a program")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().stdin(Stdio::null());
    let output = soon("the probe to end", command.kill_on_drop(true).output())
        .await?
        .with_context(|| format!("start `{program}`"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "the probe ended with {}: {said} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}
