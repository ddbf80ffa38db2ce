//! The vocabulary of verdicts: what can be wrong, and at which stage of a VM's life. `docs/causes.md` is made from this
//! table. The vocabulary may grow; an id never changes its meaning.
use serde::{Deserialize, Serialize};

macro_rules! kebab_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $id:tt),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $id)] $variant,)+
        }

        impl $name {
            /// Every value, in declared order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The id on the wire and in the documentation.
            pub const fn id(self) -> &'static str {
                match self { $(Self::$variant => $id,)+ }
            }

            /// The value with this id.
            pub fn from_id(id: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| v.id() == id)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.id())
            }
        }
    };
}

kebab_enum! {
    /// How far a VM or a sign-in got, earliest first. A verdict is the earliest stage with the strongest evidence.
    Stage {
        ImageNotBuilt = "image-not-built",
        WrongImage = "wrong-image",
        NoBoot = "no-boot",
        NoStream = "no-stream",
        UnitWaiting = "unit-waiting",
        UnitFailed = "unit-failed",
        ListeningNotReady = "listening-not-ready",
        ContractMismatch = "contract-mismatch",
        Provider = "provider",
    }
}

kebab_enum! {
    /// One cause of a failure.
    Cause {
        BuildFailed = "build-failed",
        ImageMissing = "image-missing",
        MadeFromOlderImage = "made-from-older-image",
        AgentBuildMismatch = "agent-build-mismatch",
        RootDeviceMissing = "root-device-missing",
        RootDriverMissing = "root-driver-missing",
        InitMissing = "init-missing",
        InitCrashed = "init-crashed",
        MountDeviceMissing = "mount-device-missing",
        FilesystemCheckFailed = "filesystem-check-failed",
        FirstBootPrompt = "first-boot-prompt",
        OutOfMemoryGuest = "out-of-memory-guest",
        KernelPanic = "kernel-panic",
        VmmExited = "vmm-exited",
        GuestNotExecuting = "guest-not-executing",
        VmmMissing = "vmm-missing",
        HostDiskFull = "host-disk-full",
        LaunchRefused = "launch-refused",
        SnapshotRefused = "snapshot-refused",
        SnapshotFailed = "snapshot-failed",
        StreamRefused = "stream-refused",
        StreamLost = "stream-lost",
        NetworkDriverMissing = "network-driver-missing",
        RunnerLost = "runner-lost",
        HostLost = "host-lost",
        UnitNotEnabled = "unit-not-enabled",
        UnitMasked = "unit-masked",
        UnitFileMissing = "unit-file-missing",
        EnablementLinkInvalid = "enablement-link-invalid",
        WantedByUnreachedTarget = "wanted-by-unreached-target",
        TemplateWithoutInstance = "template-without-instance",
        DefaultTargetWrong = "default-target-wrong",
        GeneratorHangs = "generator-hangs",
        OrderingCycle = "ordering-cycle",
        ConflictingUnit = "conflicting-unit",
        ConditionUnmet = "condition-unmet",
        WaitsForNetworkOnline = "waits-for-network-online",
        NetworkMatchesNoLink = "network-matches-no-link",
        WaitsForUnit = "waits-for-unit",
        UnitShadowed = "unit-shadowed",
        UnitFileUnreadable = "unit-file-unreadable",
        UnitWithoutExec = "unit-without-exec",
        UnitSettingsRefused = "unit-settings-refused",
        ExecPathInvalid = "exec-path-invalid",
        RequiredUnitMissing = "required-unit-missing",
        RequiredUnitMasked = "required-unit-masked",
        RequiredUnitFailed = "required-unit-failed",
        RequisiteInactive = "requisite-inactive",
        BoundUnitStopped = "bound-unit-stopped",
        AssertFailed = "assert-failed",
        JobTimeout = "job-timeout",
        ExecMissing = "exec-missing",
        ExecNotExecutable = "exec-not-executable",
        ExecWrongArchitecture = "exec-wrong-architecture",
        ExecFormat = "exec-format",
        ExecInterpreterMissing = "exec-interpreter-missing",
        SharedLibraryMissing = "shared-library-missing",
        UserMissing = "user-missing",
        GroupMissing = "group-missing",
        WorkingDirectoryMissing = "working-directory-missing",
        EnvironmentFileMissing = "environment-file-missing",
        CredentialMissing = "credential-missing",
        NamespacePathMissing = "namespace-path-missing",
        SecurityProfileMissing = "security-profile-missing",
        PreStartFailed = "pre-start-failed",
        ProgramFileMissing = "program-file-missing",
        StartLimitHit = "start-limit-hit",
        ExitedCleanly = "exited-cleanly",
        NeverNotifiedReady = "never-notified-ready",
        WatchdogKilled = "watchdog-killed",
        Crashed = "crashed",
        IllegalInstruction = "illegal-instruction",
        KilledBySeccomp = "killed-by-seccomp",
        MemoryProtection = "memory-protection",
        OutOfMemoryCgroup = "out-of-memory-cgroup",
        PortInUse = "port-in-use",
        LocalhostUnresolvable = "localhost-unresolvable",
        DiskFull = "disk-full",
        RootReadOnly = "root-read-only",
        ListensOnLoopback = "listens-on-loopback",
        ListensOnWrongPort = "listens-on-wrong-port",
        EnvironmentIgnored = "environment-ignored",
        PrivateNetwork = "private-network",
        AddressFiltered = "address-filtered",
        FirewallDrops = "firewall-drops",
        WrongAddress = "wrong-address",
        ListeningNotAnswering = "listening-not-answering",
        DisplayNotReady = "display-not-ready",
        BrowserNotReady = "browser-not-ready",
        BrowserMissing = "browser-missing",
        AgentIncompatible = "agent-incompatible",
        PackIncompatible = "pack-incompatible",
        EgressRefused = "egress-refused",
        EgressUnreachable = "egress-unreachable",
        NameNotFound = "name-not-found",
        TlsFailed = "tls-failed",
        ToolFailed = "tool-failed",
        ToolNeedsTerminal = "tool-needs-terminal",
        UrlNotCaptured = "url-not-captured",
        CallbackNotReached = "callback-not-reached",
        ConsentDenied = "consent-denied",
        StateMismatch = "state-mismatch",
        CodeExpired = "code-expired",
        VerifierRefused = "verifier-refused",
        TokenEndpointFailed = "token-endpoint-failed",
        CredentialInvalid = "credential-invalid",
        CredentialMoved = "credential-moved",
        PersonLeft = "person-left",
        Deadline = "deadline",
    }
}

kebab_enum! {
    /// Evidence is weak, and why. A note is never the verdict.
    Note {
        EvidenceConsoleDisabled = "evidence-console-disabled",
        EvidenceJournalVolatile = "evidence-journal-volatile",
        EvidenceJournalOtherMachine = "evidence-journal-other-machine",
        EvidenceJournalNotFlushed = "evidence-journal-not-flushed",
        EvidenceJournalNamespace = "evidence-journal-namespace",
        EvidenceJournaldMasked = "evidence-journald-masked",
        EvidenceOutputElsewhere = "evidence-output-elsewhere",
        EvidenceOverlayRoot = "evidence-overlay-root",
        EvidenceLogLevel = "evidence-log-level",
        EvidenceClock = "evidence-clock",
        EvidenceFileSystemErrors = "evidence-file-system-errors",
    }
}

impl Cause {
    /// Whether it only says how far a VM came, as a runner sees it from outside when a deadline passes. Whatever names a
    /// reason explains it.
    pub const fn is_missed_milestone(self) -> bool {
        matches!(
            self,
            Self::StreamRefused
                | Self::ListeningNotAnswering
                | Self::NeverNotifiedReady
                | Self::DisplayNotReady
                | Self::BrowserNotReady
        )
    }

    /// The stage at which this cause stops a VM or a sign-in.
    pub const fn stage(self) -> Stage {
        match self {
            Self::BuildFailed | Self::ImageMissing => Stage::ImageNotBuilt,
            Self::MadeFromOlderImage | Self::AgentBuildMismatch => Stage::WrongImage,
            Self::RootDeviceMissing
            | Self::RootDriverMissing
            | Self::InitMissing
            | Self::InitCrashed
            | Self::MountDeviceMissing
            | Self::FilesystemCheckFailed
            | Self::FirstBootPrompt
            | Self::OutOfMemoryGuest
            | Self::KernelPanic
            | Self::VmmExited
            | Self::GuestNotExecuting
            | Self::VmmMissing
            | Self::HostDiskFull
            | Self::LaunchRefused
            | Self::SnapshotRefused
            | Self::SnapshotFailed => Stage::NoBoot,
            Self::StreamRefused
            | Self::StreamLost
            | Self::NetworkDriverMissing
            | Self::RunnerLost
            | Self::HostLost => Stage::NoStream,
            Self::UnitNotEnabled
            | Self::UnitMasked
            | Self::UnitFileMissing
            | Self::EnablementLinkInvalid
            | Self::WantedByUnreachedTarget
            | Self::TemplateWithoutInstance
            | Self::DefaultTargetWrong
            | Self::GeneratorHangs
            | Self::OrderingCycle
            | Self::ConflictingUnit
            | Self::ConditionUnmet
            | Self::WaitsForNetworkOnline
            | Self::NetworkMatchesNoLink
            | Self::WaitsForUnit => Stage::UnitWaiting,
            Self::UnitShadowed
            | Self::UnitFileUnreadable
            | Self::UnitWithoutExec
            | Self::UnitSettingsRefused
            | Self::ExecPathInvalid
            | Self::RequiredUnitMissing
            | Self::RequiredUnitMasked
            | Self::RequiredUnitFailed
            | Self::RequisiteInactive
            | Self::BoundUnitStopped
            | Self::AssertFailed
            | Self::JobTimeout
            | Self::ExecMissing
            | Self::ExecNotExecutable
            | Self::ExecWrongArchitecture
            | Self::ExecFormat
            | Self::ExecInterpreterMissing
            | Self::SharedLibraryMissing
            | Self::UserMissing
            | Self::GroupMissing
            | Self::WorkingDirectoryMissing
            | Self::EnvironmentFileMissing
            | Self::CredentialMissing
            | Self::NamespacePathMissing
            | Self::SecurityProfileMissing
            | Self::PreStartFailed
            | Self::ProgramFileMissing
            | Self::StartLimitHit
            | Self::ExitedCleanly
            | Self::NeverNotifiedReady
            | Self::WatchdogKilled
            | Self::Crashed
            | Self::IllegalInstruction
            | Self::KilledBySeccomp
            | Self::MemoryProtection
            | Self::OutOfMemoryCgroup
            | Self::PortInUse
            | Self::LocalhostUnresolvable
            | Self::DiskFull
            | Self::RootReadOnly => Stage::UnitFailed,
            Self::ListensOnLoopback
            | Self::ListensOnWrongPort
            | Self::EnvironmentIgnored
            | Self::PrivateNetwork
            | Self::AddressFiltered
            | Self::FirewallDrops
            | Self::WrongAddress
            | Self::ListeningNotAnswering
            | Self::DisplayNotReady
            | Self::BrowserNotReady
            | Self::BrowserMissing => Stage::ListeningNotReady,
            Self::AgentIncompatible | Self::PackIncompatible => Stage::ContractMismatch,
            Self::EgressRefused
            | Self::EgressUnreachable
            | Self::NameNotFound
            | Self::TlsFailed
            | Self::ToolFailed
            | Self::ToolNeedsTerminal
            | Self::UrlNotCaptured
            | Self::CallbackNotReached
            | Self::ConsentDenied
            | Self::StateMismatch
            | Self::CodeExpired
            | Self::VerifierRefused
            | Self::TokenEndpointFailed
            | Self::CredentialInvalid
            | Self::CredentialMoved
            | Self::PersonLeft
            | Self::Deadline => Stage::Provider,
        }
    }

    /// What the cause means, in words for people.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::BuildFailed => "a build phase failed; no image",
            Self::ImageMissing => "no image has this alias or digest",
            Self::MadeFromOlderImage => "the VM's image is not the one the alias points to",
            Self::AgentBuildMismatch => "the agent that answers is not the one the image declares",
            Self::RootDeviceMissing => "the kernel or initrd found no such root device",
            Self::RootDriverMissing => "no driver for the root device, built in or in an initrd",
            Self::InitMissing => "there is no PID 1 program",
            Self::InitCrashed => "PID 1 died",
            Self::MountDeviceMissing => {
                "a mount of fstab waits for a device that does not exist; emergency mode"
            }
            Self::FilesystemCheckFailed => "the root filesystem needs a manual check",
            Self::FirstBootPrompt => "systemd-firstboot waits for an answer on the console",
            Self::OutOfMemoryGuest => "the guest as a whole ran out of memory",
            Self::KernelPanic => "any other panic",
            Self::VmmExited => "the VMM ended or was killed, with its own message",
            Self::GuestNotExecuting => {
                "the VMM says running and the guest makes no progress (for instance no usable KVM)"
            }
            Self::VmmMissing => "no VMM that can run the image is installed",
            Self::HostDiskFull => "the host has no room left for the VM or its evidence",
            Self::LaunchRefused => {
                "the host refused a file, directory or process that the VM's runner needs"
            }
            Self::SnapshotRefused => {
                "the memory snapshot does not belong to this host or image, or is damaged"
            }
            Self::SnapshotFailed => "a VM's memory could not be saved or loaded",
            Self::StreamRefused => "the guest is up, the stream to the agent was never there",
            Self::StreamLost => "the stream to the agent broke",
            Self::NetworkDriverMissing => "an image that relies on a NIC has no driver for it",
            Self::RunnerLost => "the process that owned the VM ended without a word",
            Self::HostLost => {
                "the host that ran the VM, or its controller, does not answer any more"
            }
            Self::UnitNotEnabled => "nothing that boots pulls the unit in",
            Self::UnitMasked => "masked: link to /dev/null, empty file, command line, or generator",
            Self::UnitFileMissing => "it is wanted, and no file of that name is in the search path",
            Self::EnablementLinkInvalid => {
                "the entry under `.wants` has a wrong name, place or kind, so it is ignored"
            }
            Self::WantedByUnreachedTarget => "pulled in by a target that this boot does not reach",
            Self::TemplateWithoutInstance => "only the template exists or is enabled",
            Self::DefaultTargetWrong => {
                "the effective default target (file, link or command line) does not reach the unit"
            }
            Self::GeneratorHangs => "a generator held up or changed what is loaded",
            Self::OrderingCycle => "systemd deleted a start job to break a cycle",
            Self::ConflictingUnit => "a conflict in the same transaction removed the job",
            Self::ConditionUnmet => {
                "a `Condition…=` or `ExecCondition=` was false: skipped, not failed"
            }
            Self::WaitsForNetworkOnline => "queued behind `network-online.target`",
            Self::NetworkMatchesNoLink => {
                "the network configuration matches no interface of this VM"
            }
            Self::WaitsForUnit => "queued behind another unit that does not finish",
            Self::UnitShadowed => "an older file of the same name earlier in the search path wins",
            Self::UnitFileUnreadable => {
                "the merged unit cannot be loaded: its encoding is not text systemd reads"
            }
            Self::UnitWithoutExec => "the merged unit has no ExecStart=",
            Self::UnitSettingsRefused => "the merged unit combines settings that systemd refuses",
            Self::ExecPathInvalid => "a path or specifier in the merged unit is refused",
            Self::RequiredUnitMissing => "a unit that it requires does not exist",
            Self::RequiredUnitMasked => "a unit that it requires is masked",
            Self::RequiredUnitFailed => "a unit that it requires failed",
            Self::RequisiteInactive => "a unit that it has as requisite was not active yet",
            Self::BoundUnitStopped => "`BindsTo=` stopped it",
            Self::AssertFailed => "an `Assert…=` was false",
            Self::JobTimeout => "the job was given up while it waited",
            Self::ExecMissing => "the program is not there",
            Self::ExecNotExecutable => {
                "the program may not be executed: permission, or a file system mounted noexec"
            }
            Self::ExecWrongArchitecture => "the program is built for another architecture",
            Self::ExecFormat => {
                "the program is neither a binary nor a script with an interpreter line"
            }
            Self::ExecInterpreterMissing => {
                "ELF interpreter or shebang interpreter missing (also a shebang with CRLF)"
            }
            Self::SharedLibraryMissing => "a needed library cannot be resolved",
            Self::UserMissing => "the user that the unit names does not exist",
            Self::GroupMissing => "the group that the unit names does not exist",
            Self::WorkingDirectoryMissing => "the working directory does not exist",
            Self::EnvironmentFileMissing => "the environment file does not exist",
            Self::CredentialMissing => "the credential that the unit loads does not exist",
            Self::NamespacePathMissing => "a path that the unit binds or restricts does not exist",
            Self::SecurityProfileMissing => "the AppArmor profile or SELinux label does not exist",
            Self::PreStartFailed => "`ExecStartPre=` failed",
            Self::ProgramFileMissing => "the interpreter runs, its script or module is missing",
            Self::StartLimitHit => "restarted too often",
            Self::ExitedCleanly => "the program ended with success",
            Self::NeverNotifiedReady => "no readiness notification in time",
            Self::WatchdogKilled => "no watchdog ping in time",
            Self::Crashed => "the program died of a signal",
            Self::IllegalInstruction => "the program died of SIGILL",
            Self::KilledBySeccomp => "the program died of SIGSYS: a system call filter",
            Self::MemoryProtection => "executable memory was refused",
            Self::OutOfMemoryCgroup => "the unit reached its own memory limit",
            Self::PortInUse => "the port is taken",
            Self::LocalhostUnresolvable => "cannot resolve the name to bind to",
            Self::DiskFull => "cannot write: the disk is full",
            Self::RootReadOnly => "cannot write: the root file system is read-only",
            Self::ListensOnLoopback => "listens on loopback only",
            Self::ListensOnWrongPort => "listens on another port",
            Self::EnvironmentIgnored => {
                "a line of the environment file was ignored, so a default applies"
            }
            Self::PrivateNetwork => "runs in a network namespace of its own",
            Self::AddressFiltered => "an address filter on its cgroup drops the traffic",
            Self::FirewallDrops => "a packet filter drops the traffic",
            Self::WrongAddress => "the guest has another address than expected",
            Self::ListeningNotAnswering => "accepts and does not answer",
            Self::DisplayNotReady => "the screen is not painted or has the wrong size",
            Self::BrowserNotReady => "the browser is not up",
            Self::BrowserMissing => "there is no real browser",
            Self::AgentIncompatible => {
                "agent and host do not speak the same version, or a capability is missing"
            }
            Self::PackIncompatible => "provider pack and tool do not fit",
            Self::EgressRefused => "the way out refused the destination by policy",
            Self::EgressUnreachable => "the network did not reach the destination",
            Self::NameNotFound => "the destination has no address",
            Self::TlsFailed => "TLS failed: clock, certificate authority or name",
            Self::ToolFailed => "the tool ended with an error",
            Self::ToolNeedsTerminal => "the tool waits for a terminal that answers",
            Self::UrlNotCaptured => "the tool never asked to open an authorization URL",
            Self::CallbackNotReached => "the redirect never reached the tool",
            Self::ConsentDenied => "the person or the provider denied consent",
            Self::StateMismatch => "the state that came back is not the one sent",
            Self::CodeExpired => "the authorization code was expired or used",
            Self::VerifierRefused => "the provider refused the PKCE verifier",
            Self::TokenEndpointFailed => "the token endpoint failed or did not answer in time",
            Self::CredentialInvalid => "the tool wrote something that is not a complete credential",
            Self::CredentialMoved => {
                "the tool wrote its credential somewhere else than the pack says"
            }
            Self::PersonLeft => "nobody signed in before the deadline and no viewer was there",
            Self::Deadline => "the sign-in did not finish before its deadline",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_round_trip() {
        for cause in Cause::ALL {
            assert_eq!(Cause::from_id(cause.id()), Some(*cause));
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.id());
            assert!(!cause.meaning().is_empty());
        }
    }

    #[test]
    fn stages_keep_their_order() {
        assert!(Stage::ImageNotBuilt < Stage::WrongImage && Stage::UnitWaiting < Stage::UnitFailed);
        assert_eq!(Stage::ALL.last(), Some(&Stage::Provider));
    }
}
