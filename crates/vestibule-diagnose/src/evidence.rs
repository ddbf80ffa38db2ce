//! What a diagnosis is made from. Everything is optional; the more there is, the more can be said.
use crate::{
    disk::{Root, Tree, ext4::Ext4Tree, source::ByteSource},
    host::HostFacts,
    journal::Journal,
};
use vestibule_api::{agent::Report, error::Chain};

/// The evidence of one VM, or of one image that never ran.
#[derive(Debug, Default)]
pub struct Evidence {
    pub(crate) disk: Option<Root>,
    /// Why a disk that was given cannot be read.
    pub(crate) disk_error: Option<String>,
    /// Bytes of the image file that the disk is read from.
    pub(crate) image_len: Option<u64>,
    pub(crate) serial: Option<Vec<u8>>,
    pub(crate) journals: Vec<Journal>,
    pub(crate) cmdline: Option<String>,
    pub(crate) kernel_modules: Option<String>,
    pub(crate) report: Option<Report>,
    pub(crate) host: HostFacts,
    pub(crate) units: Vec<String>,
    pub(crate) expected_address: Option<String>,
    pub(crate) expected_port: Option<u16>,
}

/// Bytes of a serial log that are read; the end counts.
const SERIAL_LIMIT: usize = 16 << 20;

impl Evidence {
    /// No evidence yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest's root file system: an [`crate::disk::ext4::Ext4Tree`] or a [`crate::disk::dir::DirTree`].
    #[must_use]
    pub fn disk(mut self, tree: impl Tree + 'static) -> Self {
        self.disk = Some(Root::new(tree));
        self
    }

    /// A disk or an image of one, raw or inside a partition table. One that cannot be read as ext4 is evidence too.
    #[must_use]
    pub fn disk_image(mut self, source: impl ByteSource + 'static) -> Self {
        self.image_len = Some(source.len());
        match Ext4Tree::open(source) {
            Ok(tree) => self.disk(tree),
            Err(err) => self.unreadable_disk(Chain(&err).to_string()),
        }
    }

    /// A disk was there and could not be read; in words.
    #[must_use]
    pub fn unreadable_disk(mut self, why: impl Into<String>) -> Self {
        self.disk_error = Some(why.into());
        self
    }

    /// The serial console, raw.
    #[must_use]
    pub fn serial(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        let mut bytes = bytes.into();
        let extra = bytes.len().saturating_sub(SERIAL_LIMIT);
        bytes.drain(..extra);
        self.serial = Some(bytes);
        self
    }

    /// A journal, in the native or the export format. `source` names it in quotes; `journal` where there is one.
    #[must_use]
    pub fn journal(mut self, bytes: &[u8], source: &str) -> Self {
        self.journals.push(Journal::parse(bytes, source));
        self
    }

    /// The kernel command line. Without it, the one that console or journal printed is used.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = Some(cmdline.into());
        self
    }

    /// The release of the kernel that boots the disk (`uname -r`), whose modules the disk should hold.
    #[must_use]
    pub fn kernel_modules(mut self, release: impl Into<String>) -> Self {
        self.kernel_modules = Some(release.into());
        self
    }

    /// The agent's last report.
    #[must_use]
    pub fn report(mut self, report: Report) -> Self {
        self.report = Some(report);
        self
    }

    /// What the runner knows.
    #[must_use]
    pub fn host(mut self, host: HostFacts) -> Self {
        self.host = host;
        self
    }

    /// The digest of the image that a new VM would be made from, where it is known.
    #[must_use]
    pub fn current_image(mut self, digest: Option<String>) -> Self {
        self.host.current_digest = digest;
        self
    }

    /// A unit that must run. Without any, those of the manifest are meant that the runner wrote into the bundle; else the
    /// agent's unit where the disk knows it; else the services that the default target starts from `/etc`.
    #[must_use]
    pub fn unit(mut self, name: impl Into<String>) -> Self {
        self.units.push(name.into());
        self
    }

    /// The address under which the host reaches the guest, where it has one.
    #[must_use]
    pub fn expected_address(mut self, address: impl Into<String>) -> Self {
        self.expected_address = Some(address.into());
        self
    }

    /// The port on which the unit should listen; 8080 for the agent.
    #[must_use]
    pub fn expected_port(mut self, port: u16) -> Self {
        self.expected_port = Some(port);
        self
    }
}
