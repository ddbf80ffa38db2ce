//! The evidence, read once, for all rules: the unit model over the disk, one log, and what they say together.
use std::cell::OnceCell;

use crate::{
    disk::Root,
    evidence::Evidence,
    host::HostFacts,
    journal::{FileState, Journal},
    log::{Log, run::UnitLog},
    units::{
        Overlay, Unit, UnitSet,
        boot::Boot,
        condition::Facts,
        exec::Resolver,
        fstab::Fstab,
        generators::{self, Generator},
        install::{self, MachineId, Presets},
        names,
        network::Networking,
        runtime_paths::RuntimePaths,
        users::Accounts,
    },
};
use vestibule_api::{
    agent::{AGENT_PORT, Report},
    finding::Quote,
};

/// The agent's unit.
pub const AGENT_UNIT: &str = "vm-browser-agent.service";

/// Bytes of one journal file of a disk that are read.
const JOURNAL_LIMIT: usize = 32 << 20;
/// Journal files of a disk that are read, newest names last.
const JOURNAL_FILES: usize = 4;

/// What does not depend on the unit model.
#[derive(Debug)]
pub struct Base<'a> {
    pub root: &'a Root,
    pub accounts: Accounts,
    pub fstab: Fstab,
    pub generators: Vec<Generator>,
    pub machine_id: MachineId,
}

impl<'a> Base<'a> {
    /// Reads a disk as a boot with this kernel command line would.
    pub fn read(root: &'a Root, cmdline: Option<&str>) -> Self {
        let cmdline = cmdline.unwrap_or_default();
        Self {
            root,
            accounts: Accounts::read(root),
            fstab: if crate::text::switch(cmdline, "fstab") == Some(false) {
                Fstab::default()
            } else {
                Fstab::read(root)
            },
            generators: generators::custom(root),
            machine_id: install::machine_id(root, cmdline),
        }
    }

    /// The unit model with everything that comes from outside the unit files.
    pub fn units(&'a self, cmdline: Option<&str>) -> UnitSet<'a> {
        let units = UnitSet::new(self.root);
        let mut overlay = match &self.machine_id {
            MachineId::FirstBoot(quote) => install::first_boot_overlay(&units, quote),
            MachineId::Set(_) | MachineId::Empty => Overlay::default(),
        };
        for (name, quote) in self.generators.iter().flat_map(|g| &g.masks) {
            overlay.masked.insert(name.clone(), quote.clone());
        }
        for word in cmdline.unwrap_or_default().split_whitespace() {
            let quote = || Quote {
                source: "cmdline".into(),
                line: None,
                text: word.to_owned(),
            };
            if let Some(name) = word.strip_prefix("systemd.mask=") {
                let name = if name.contains('.') {
                    name.to_owned()
                } else {
                    format!("{name}.service")
                };
                overlay.masked.insert(name, quote());
            } else if let Some(name) = word.strip_prefix("systemd.wants=") {
                let target = "default.target".to_owned();
                overlay
                    .wants
                    .push((target, name.to_owned(), crate::units::Pull::Wants, quote()));
            }
        }
        units.with_overlay(overlay)
    }
}

/// The disk's side of a case.
#[derive(Debug)]
pub struct DiskCase<'a> {
    pub base: &'a Base<'a>,
    pub units: &'a UnitSet<'a>,
    pub boot: Boot<'a>,
    pub resolver: Resolver<'a>,
    pub paths: RuntimePaths,
    networking: OnceCell<Networking>,
    presets: OnceCell<Presets>,
}

impl<'a> DiskCase<'a> {
    /// Builds the transaction and what rules ask of a disk.
    pub fn new(base: &'a Base<'a>, units: &'a UnitSet<'a>, cmdline: Option<&str>) -> Self {
        let boot = Boot::new(units, cmdline);
        let mounts = base.fstab.with_units(&boot);
        Self {
            base,
            units,
            boot,
            resolver: Resolver::new(base.root, &base.accounts, mounts),
            paths: RuntimePaths::read(base.root, units, &base.fstab),
            networking: OnceCell::new(),
            presets: OnceCell::new(),
        }
    }

    /// The preset policy, read once for a diagnosis.
    pub fn presets(&self) -> &Presets {
        self.presets.get_or_init(|| Presets::read(self.base.root))
    }

    /// The network's configuration, and what decides which of it is for the card. Read once: several rules of each unit ask.
    pub fn networking(&self, case: &Case<'_>) -> &Networking {
        self.networking.get_or_init(|| {
            let networkd = self.units.load("systemd-networkd.service");
            let generator = "systemd-network-generator.service";
            let generates = self.units.load(generator).is_loaded() && self.boot.starts(generator);
            let facts = self.facts(&networkd, case);
            Networking::read(&facts, &self.base.accounts, &networkd, generates)
        })
    }

    /// The facts that decide conditions of `unit`.
    pub fn facts<'f>(&'f self, unit: &'f Unit, case: &'f Case<'_>) -> Facts<'f> {
        Facts {
            root: self.base.root,
            paths: &self.paths,
            cmdline: case.cmdline.as_deref(),
            first_boot: matches!(self.base.machine_id, MachineId::FirstBoot(_)),
            machine: self.resolver.machine,
            kernel: case.kernel.as_deref(),
            unit,
        }
    }
}

/// Everything that rules look at.
#[derive(Debug)]
pub struct Case<'a> {
    pub disk: Option<DiskCase<'a>>,
    pub disk_error: Option<String>,
    pub log: Log,
    /// Bytes of the image that the disk was read from, where it was one.
    pub image_len: Option<u64>,
    pub serial_given: bool,
    /// Bytes of the serial log.
    pub serial_len: usize,
    pub journal_given: bool,
    /// Entries in all journals together.
    pub journal_entries: usize,
    pub journals_online: bool,
    /// Machine ids of journal directories on the disk.
    pub journal_machines: Vec<String>,
    pub cmdline: Option<String>,
    pub kernel: Option<String>,
    pub kernel_given: bool,
    pub report: Option<Report>,
    pub host: HostFacts,
    /// The units that must run.
    pub units: Vec<String>,
    pub expected_address: Option<String>,
    pub expected_port: Option<u16>,
}

impl<'a> Case<'a> {
    /// What does not need the disk; the disk's side is set afterwards.
    pub fn new(evidence: &Evidence) -> Self {
        let mut log = Log::default();
        let (mut entries, mut online) = (0_usize, false);
        let mut machines = Vec::new();
        let from_disk = evidence
            .disk
            .as_ref()
            .map(|root| disk_journals(root, &mut machines))
            .unwrap_or_default();
        if let Some(serial) = &evidence.serial {
            log.add_console(serial);
        }
        // Journals that were handed in replace those on the disk: they are the same ones, or newer.
        let journals = if evidence.journals.is_empty() {
            &from_disk
        } else {
            &evidence.journals
        };
        for journal in journals {
            entries = entries.saturating_add(journal.entries.len());
            online |= journal.state == FileState::Online;
            log.add_journal(journal);
        }
        let cmdline = evidence.cmdline.clone().or_else(|| log.cmdline());
        let kernel = evidence.kernel_modules.clone().or_else(|| log.kernel());
        Self {
            disk: None,
            disk_error: evidence.disk_error.clone(),
            image_len: evidence.image_len,
            serial_given: evidence.serial.is_some(),
            serial_len: evidence.serial.as_ref().map_or(0, Vec::len),
            journal_given: !evidence.journals.is_empty() || !from_disk.is_empty(),
            journal_entries: entries,
            journals_online: online,
            journal_machines: machines,
            cmdline,
            kernel,
            kernel_given: evidence.kernel_modules.is_some(),
            log,
            report: evidence.report.clone(),
            host: evidence.host.clone(),
            units: if evidence.units.is_empty() {
                evidence.host.required_units.clone()
            } else {
                evidence.units.clone()
            },
            expected_address: evidence.expected_address.clone(),
            expected_port: evidence.expected_port,
        }
    }

    /// Sets the disk's side, and the units meant where nobody named one.
    pub fn with_disk(mut self, disk: DiskCase<'a>) -> Self {
        if self.units.is_empty() {
            self.units = default_units(&disk);
        }
        self.disk = Some(disk);
        self
    }

    /// Names the agent where there is neither a disk nor a unit.
    pub fn with_default_units(mut self) -> Self {
        if self.units.is_empty() && self.disk.is_none() {
            self.units.push(AGENT_UNIT.to_owned());
        }
        self
    }

    /// The log of one unit.
    pub fn unit_log(&self, name: &str) -> UnitLog<'_> {
        let description = self
            .disk
            .as_ref()
            .map(|d| d.units.load(name).description().to_owned());
        UnitLog::new(&self.log, name, description.as_deref())
    }

    /// The port on which a unit should listen.
    pub fn port_of(&self, unit: &str) -> Option<u16> {
        self.expected_port
            .or_else(|| (unit == AGENT_UNIT).then_some(AGENT_PORT))
    }

    /// Whether evidence of a run was given at all.
    pub fn has_run(&self) -> bool {
        !self.log.is_empty() || self.report.is_some()
    }

    /// Whether the log shows PID 1 at work.
    pub fn reached_userspace(&self) -> bool {
        self.log
            .first(|l| l.speaker == crate::log::Speaker::Manager)
            .is_some()
    }
}

/// The agent's unit where the disk has a trace of it, else what the default target itself wants from `/etc`.
fn default_units(disk: &DiskCase<'_>) -> Vec<String> {
    let known =
        disk.units.files().contains_key(AGENT_UNIT) || disk.boot.jobs.contains_key(AGENT_UNIT);
    if known {
        return vec![AGENT_UNIT.to_owned()];
    }
    let local = |name: &&String| {
        let unit = disk.units.load(name);
        names::unit_type(name) == "service"
            && unit
                .fragment
                .as_deref()
                .is_some_and(|f| f.starts_with("/etc/systemd/"))
    };
    disk.boot.jobs.keys().filter(local).cloned().collect()
}

/// The newest journal files on a disk.
fn disk_journals(root: &Root, machines: &mut Vec<String>) -> Vec<Journal> {
    let mut files = Vec::new();
    for entry in root.list("/var/log/journal").iter() {
        let dir = format!("/var/log/journal/{}", entry.name);
        let found = root.list(&dir);
        if !found.is_empty() {
            machines.push(entry.name.clone());
        }
        for file in found
            .iter()
            .filter(|f| f.name.ends_with(".journal") && f.name.starts_with("system"))
        {
            // `system.journal` is the newest; archived names carry their first sequence number.
            files.push((
                file.name == "system.journal",
                format!("{dir}/{}", file.name),
            ));
        }
    }
    files.sort();
    let skip = files.len().saturating_sub(JOURNAL_FILES);
    files
        .into_iter()
        .skip(skip)
        .filter_map(|(_, path)| {
            let bytes = root.read_at(&path, 0, JOURNAL_LIMIT)?;
            Some(Journal::parse(&bytes, &format!("disk:{path}")))
        })
        .collect()
}
