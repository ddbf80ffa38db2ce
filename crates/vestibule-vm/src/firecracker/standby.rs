//! A VMM that waits for its VM: jailed, its API up, without a guest and without a file of anybody's. What its start takes is no part of
//! a VM's then. Only one in Firecracker's jailer can wait: without, the rules that confine it name its VM's files.
use super::{
    FirecrackerDriver,
    jailed::{self, Begin, JAIL, Said},
    launch,
    place::Vmm,
    version::Version,
};
use crate::{
    driver::{Capabilities, LaunchError},
    jail::Jail,
};
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::FutureExt as _;
use std::{io, sync::Arc};
use vestibule_api::{
    ids::MachineId,
    machine::{JailSpec, VmSpec},
    standby::Preparation,
};

/// What its group is limited to until there is a guest.
const MEMORY_MIB: u32 = 128;
const VCPUS: u32 = 1;

/// See the module. Ended and removed when dropped, which blocks until its processes are gone.
#[derive(Debug)]
pub struct Standing {
    // In the order in which they go.
    vmm: Vmm,
    said: Said,
    version: Version,
    jail: Arc<Jail>,
    of: JailSpec,
    /// Below it is the jail, until there is a VM.
    place: Removed,
}

/// A directory that goes with this.
#[derive(Debug)]
struct Removed(Utf8PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        if let Err(err) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0, error = %err, "what was made for no VM is left");
        }
    }
}

impl FirecrackerDriver {
    /// Starts a VMM that waits; none where VMMs are not jailed.
    ///
    /// # Errors
    /// When its jail is not made, or it does not come up.
    pub async fn stand_by(
        &self,
        capabilities: &Capabilities,
        preparation: &Preparation,
    ) -> Result<Option<Standing>, LaunchError> {
        let Some(jailer) = self.jailer() else {
            return Ok(None);
        };
        let of = preparation.jail;
        let jail = tokio::task::spawn_blocking(move || Jail::make(of, MEMORY_MIB, VCPUS))
            .await
            .map_err(io::Error::other)
            .and_then(|made| made.map_err(io::Error::other))
            .map_err(LaunchError::prepare("make the VMM's jail"))?;
        let Some(uid) = jail.uid() else {
            return Ok(None);
        };
        let id = MachineId::generate();
        let place = Removed(Utf8Path::new(&preparation.directory).join(id.to_string()));
        let begun = jailed::begin(Begin {
            program: self.program(),
            jailer,
            jail: &jail,
            uid,
            base: place.0.join(JAIL),
            id,
            writes: 0,
        });
        let (vmm, said) = begun.await?;
        let version = launch::greeted(&vmm, capabilities).await?;
        Ok(Some(Standing {
            vmm,
            said,
            version,
            jail: Arc::new(jail),
            of,
            place,
        }))
    }
}

impl Standing {
    /// Why it can't become this VM's; none: it can.
    pub(crate) fn unfit(&self, spec: &VmSpec, capabilities: &Capabilities) -> Option<&'static str> {
        if capabilities.driver != super::NAME {
            Some("the VM is another driver's")
        } else if capabilities.version != self.version.to_string() {
            Some("another version is installed since")
        } else if spec.jail != self.of {
            Some("its user is not one of the VM's")
        } else if spec.save_to.is_some() {
            Some("it may write no file that is as long as a memory")
        } else if self.vmm.child.watch().now_or_never().is_some() {
            Some("it has ended")
        } else {
            None
        }
    }

    /// Moves what it has on disk into its VM's directory. Mounts of its own move along: they are attached to the directories, not to
    /// their names.
    ///
    /// # Errors
    /// When the VM's directory is not there, or in another file system.
    pub fn move_to(&mut self, vm_dir: &Utf8Path) -> io::Result<()> {
        let Ok(inner) = self.vmm.directory.strip_prefix(&self.place.0) else {
            return Ok(());
        };
        let moved = vm_dir.join(inner);
        std::fs::rename(self.place.0.join(JAIL), vm_dir.join(JAIL))?;
        self.vmm.directory = moved;
        Ok(())
    }

    /// The process, what it says and its version, for a VM that has its jail.
    pub(super) fn into_parts(self) -> (Vmm, Said, Version) {
        (self.vmm, self.said, self.version)
    }

    pub fn jail(&self) -> &Arc<Jail> {
        &self.jail
    }
}
