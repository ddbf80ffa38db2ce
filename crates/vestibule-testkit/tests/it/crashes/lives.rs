//! Lives of which controller, runner or VMM is killed at a random moment.
use super::{
    PATIENCE, TERMINAL, check_credential, check_receipt, check_vault, number, over, person::Person,
    rows,
};
use anyhow::{Context, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use vestibule_api::{
    ids::SessionId,
    session::{SessionState, SessionView},
};
use vestibule_testkit::{
    process::signal,
    stage::{Listing, Setting, Stage},
    wait,
};

/// What lives, and what dies.
pub(super) struct Lives {
    pub setting: Setting,
    pub person: Person,
    /// Something is killed before this, or as soon after it as it is there.
    pub longest: Duration,
    pub victims: &'static [&'static str],
}

/// One life's dice.
#[derive(Debug)]
struct Fate {
    victim: &'static str,
    moment: Duration,
    /// The person signs in as soon as they are asked, else after the kill.
    early: bool,
    /// After a controller's death the person has had enough, else the sign-in goes on.
    cancelled: bool,
}

/// What was killed.
struct Killed {
    /// The session just before.
    before: SessionView,
    at: Instant,
    /// Its number and command line.
    victim: String,
}

#[derive(Default)]
struct Tally {
    ends: BTreeMap<String, u32>,
    kills: u32,
    /// From a kill to the session's end, where that ended it.
    slowest: Duration,
}

impl Lives {
    #[expect(
        clippy::print_stdout,
        reason = "what a run did is what its reader wants"
    )]
    pub(super) async fn run(&self, lives: u32) -> Result<()> {
        let seed = number("VESTIBULE_CRASH_SEED").unwrap_or_else(|| rand::rng().random());
        println!("VESTIBULE_CRASH_SEED={seed}");
        let mut dice = StdRng::seed_from_u64(seed.into());
        let mut stage = Stage::start(&self.setting).await?;
        let before = Listing::of(stage.home());
        let mut tally = Tally::default();
        for life in 0..lives {
            let early = dice.random();
            // A person who does not wait is through in a part of the time.
            let longest = if early {
                self.longest / 4
            } else {
                self.longest
            };
            let fate = Fate {
                victim: self.victims[dice.random_range(0..self.victims.len())],
                moment: longest.mul_f64(dice.random()),
                early,
                cancelled: dice.random(),
            };
            let lived = self.live(stage, &fate, &before, &mut tally).await;
            stage = lived.with_context(|| format!("life {life}, {fate:?}"))?;
        }
        // Each is in the file that was looked at, too.
        let sessions = rows::sessions(stage.home()).await?;
        ensure!(sessions == i64::from(lives), "{sessions} sessions");
        check_vault(&stage).await?;
        let Tally {
            ends,
            kills,
            slowest,
        } = tally;
        println!(
            "{lives} lives, {kills} kills: {ends:?}; a session that lost its VM ended within {slowest:.1?}"
        );
        ensure!(kills * 3 >= lives, "too few were killed");
        stage.end().await
    }

    async fn live(
        &self,
        stage: Stage,
        fate: &Fate,
        before: &Listing,
        tally: &mut Tally,
    ) -> Result<Stage> {
        let id = stage.api().start(self.person.provider(), None).await?;
        let signing_in = async {
            if fate.early {
                // What comes of it is looked at when everything is over.
                drop(self.person.sign_in(stage.api(), id).await);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = signing_in => {}
            () = tokio::time::sleep(fate.moment) => {}
        }
        let (stage, how) = if fate.victim == "controller" {
            self.without_controller(stage, fate, id, tally).await?
        } else {
            let how = self.without_vm(&stage, fate, id, tally).await?;
            (stage, how)
        };
        let view = over(&stage, id, TERMINAL, before).await?;
        check_credential(&stage, &view, self.person).await?;
        check_receipt(&stage, &view)?;
        let end = format!("{}, {how}: {}", fate.victim, view.state.id());
        *tally.ends.entry(end).or_insert(0) += 1;
        Ok(stage)
    }

    /// Kills the controller. The next one adopts the sign-in, which goes on, or is cancelled.
    async fn without_controller(
        &self,
        stage: Stage,
        fate: &Fate,
        id: SessionId,
        tally: &mut Tally,
    ) -> Result<(Stage, &'static str)> {
        let before = stage.api().session(id).await?;
        let stage = stage.crash_and_restart().await?;
        tally.kills += 1;
        if fate.cancelled {
            stage.api().cancel(id).await?;
            return Ok((stage, "cancelled"));
        }
        let view = self.person.go_on(&stage, id).await?;
        // The same VM, not another one: from here on there may be something of its person's in it.
        ensure!(
            matches!(
                before.state,
                SessionState::Requested | SessionState::Placing | SessionState::Starting
            ) || view.machine_id == before.machine_id,
            "adopted: {before:?}, then {view:?}"
        );
        Ok((stage, "adopted"))
    }

    /// Kills the VM's runner or VMM. A session that had got somewhere ends; one that was on the way there gets another VM, and
    /// goes on.
    async fn without_vm(
        &self,
        stage: &Stage,
        fate: &Fate,
        id: SessionId,
        tally: &mut Tally,
    ) -> Result<&'static str> {
        let Some(killed) = kill(stage, fate.victim, id).await? else {
            return Ok("nothing to kill");
        };
        tally.kills += 1;
        let seen = wait::until("the end, or another VM", TERMINAL, || async {
            let view = stage.api().session(id).await;
            let view = view.map_err(|err| format!("{err:#}"))?;
            let again = view.machine_id != killed.before.machine_id;
            if again || view.state.is_terminal() {
                return Ok(view);
            }
            Err(view.state.id().to_owned())
        })
        .await
        .with_context(|| format!("killed {}", killed.victim))?;
        if !seen.state.is_terminal() {
            self.person.go_on(stage, id).await?;
            return Ok("another VM");
        }
        if killed.before.state.is_terminal() {
            return Ok("in its teardown");
        }
        tally.slowest = tally.slowest.max(killed.at.elapsed());
        ensure!(
            seen.state == SessionState::Completed || seen.failure.is_some(),
            "its session says why: {seen:?}"
        );
        Ok("lost")
    }
}

/// Kills one of the stage's processes as soon as there is one; none: the session has ended, and so has its VM.
async fn kill(stage: &Stage, victim: &str, id: SessionId) -> Result<Option<Killed>> {
    wait::until("somebody to kill", PATIENCE, || async {
        let before = stage.api().session(id).await;
        let before = before.map_err(|err| format!("{err:#}"))?;
        let ended = before.state.is_terminal();
        if let Some((pid, line)) = find(stage, victim)
            && signal(Some(pid), rustix::process::Signal::KILL)
        {
            let (at, victim) = (Instant::now(), format!("{pid}: {line}"));
            return Ok(Some(Killed { before, at, victim }));
        }
        if ended {
            Ok(None)
        } else {
            Err("nobody there".to_owned())
        }
    })
    .await
}

/// A process is for a moment what it was forked from: a runner that is none yet is still the controller, and a VMM its runner.
/// Whoever started them starts another one then, and nothing was lost.
fn find(stage: &Stage, victim: &str) -> Option<(u32, String)> {
    stage.residue().iter().find_map(|found| {
        let (pid, line) = found.strip_prefix("process ")?.split_once(' ')?;
        let pid = pid.parse().ok()?;
        let is_vmm = line.contains("qemu") || line.contains("firecracker");
        let is_runner = !is_vmm && runs_vm(pid) && !parent(pid).is_some_and(runs_vm);
        let is_victim = if victim == "vmm" { is_vmm } else { is_runner };
        is_victim.then(|| (pid, line.to_owned()))
    })
}

/// A runner, or one of the testkit's without a VM.
fn runs_vm(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    words.any(|word| word == b"run-vm" || word == b"runner")
}

/// The second field after the name, which may hold anything (proc_pid_stat(5)).
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}
