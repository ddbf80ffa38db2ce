//! The kernel that belongs to an image: Debian's, with the modules that the initrd loads and their order.
use crate::{
    apt::{self, Apt, AptError},
    cache::{Cache, CacheError, Layer, Work},
    cpio, digest,
    host::{Host, HostError},
    recipe::Recipe,
    vmlinux::{self, VmlinuxError},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
    process::Command,
};

/// Raised when the same package would give another layer.
const VERSION: &str = "kernel 2";
/// A kernel package, unpacked, is far smaller.
const UNPACKED: u64 = 1 << 30;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(transparent)]
    Apt(#[from] AptError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("unpack `{package}`")]
    Unpack {
        package: Utf8PathBuf,
        #[source]
        err: HostError,
    },
    #[error("read what is in `{package}`")]
    Read {
        package: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("`{package}` has no kernel in /boot")]
    NoKernel { package: Utf8PathBuf },
    #[error("unpack the kernel of `{package}`")]
    Vmlinux {
        package: Utf8PathBuf,
        #[source]
        err: VmlinuxError,
    },
    #[error("kernel {release} has no module `{module}`, neither as a file nor built in")]
    NoModule { release: String, module: String },
    #[error("write `{path}`")]
    Write {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
}

fn write(path: &Utf8Path, bytes: &[u8]) -> Result<(), KernelError> {
    std::fs::write(path, bytes).map_err(|err| KernelError::Write {
        path: path.to_owned(),
        err,
    })
}

/// The kernel, as its layer's directory holds it: `vmlinuz`, the same as `vmlinux`, `release`, `modules/NNN-name.ko`.
pub(crate) struct Kernel {
    pub(crate) directory: Utf8PathBuf,
    pub(crate) release: String,
    /// File names below `modules`, in load order.
    pub(crate) modules: Vec<String>,
}

impl Kernel {
    /// Reads a layer that [`layer`] made.
    pub(crate) fn open(directory: &Utf8Path) -> std::io::Result<Self> {
        let release = std::fs::read_to_string(directory.join("release"))?;
        let names: std::io::Result<Vec<String>> = directory
            .join("modules")
            .read_dir_utf8()?
            .map(|entry| Ok(entry?.file_name().to_owned()))
            .collect();
        let mut modules = names?;
        modules.sort();
        Ok(Self {
            directory: directory.to_owned(),
            release,
            modules,
        })
    }

    /// Module names as the kernel shows them, in load order.
    pub(crate) fn drivers(&self) -> Vec<String> {
        let name = |file: &String| {
            normal(
                file.split_once('-')
                    .map_or(file.as_str(), |(_, name)| name)
                    .trim_end_matches(".ko"),
            )
        };
        self.modules.iter().map(name).collect()
    }

    /// The initrd: `/init` is the agent, `/modules` what it loads.
    pub(crate) fn initrd(&self, agent: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut archive = cpio::Writer::new(Vec::new());
        for directory in ["dev", "modules", "newroot", "proc", "sys"] {
            archive.directory(directory)?;
        }
        for module in &self.modules {
            let bytes = std::fs::read(self.directory.join("modules").join(module))?;
            archive.file(&format!("modules/{module}"), &bytes, false)?;
        }
        archive.file("init", agent, true)?;
        archive.finish()
    }
}

/// The layer of the recipe's kernel, from the cache or fetched.
pub(crate) fn layer(
    host: &Host<'_>,
    cache: &Cache,
    work: &Work,
    recipe: &Recipe,
    renew: bool,
) -> Result<Layer, KernelError> {
    let wanted = &recipe.kernel;
    let key = digest::of_list(
        [VERSION, &recipe.suite, &wanted.package]
            .into_iter()
            .chain(wanted.modules.iter().map(String::as_str)),
    );
    cache.layer(work, "kernel", &key, renew, |directory| {
        let sources = apt::sources(&recipe.suite)?;
        let apt = Apt::new(
            host,
            &cache.directory("apt")?.join(&recipe.suite),
            &recipe.suite,
            &sources,
        )?;
        let package = apt.dependency(&wanted.package, "linux-image-")?;
        host.say(&format!("kernel package {package}"));
        let files = apt.download(&[&package], &work.directory.join("kernel-package"))?;
        let file = files.last().ok_or_else(|| KernelError::NoKernel {
            package: package.into(),
        })?;
        let package = Package::read(host, file)?;
        package.store(&wanted.modules, directory)
    })
}

/// What matters of a kernel package.
struct Package {
    file: Utf8PathBuf,
    release: String,
    image: Vec<u8>,
    /// The ELF file inside `image`.
    vmlinux: Vec<u8>,
    /// Name → bytes of each module.
    modules: BTreeMap<String, Vec<u8>>,
    built_in: BTreeSet<String>,
}

impl Package {
    fn read(host: &Host<'_>, file: &Utf8Path) -> Result<Self, KernelError> {
        let tar = host.output(
            Command::new("dpkg-deb").arg("--fsys-tarfile").arg(file),
            UNPACKED,
        );
        let tar = tar.map_err(|err| KernelError::Unpack {
            package: file.to_owned(),
            err,
        })?;
        let read = |err| KernelError::Read {
            package: file.to_owned(),
            err,
        };
        let (mut image, mut modules, mut built_in) = (None, BTreeMap::new(), BTreeSet::new());
        for entry in tar::Archive::new(tar.as_slice()).entries().map_err(read)? {
            let mut entry = entry.map_err(read)?;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let release = path.strip_prefix("./boot/vmlinuz-").map(str::to_owned);
            let module = path
                .strip_suffix(".ko")
                .and_then(|path| path.rsplit('/').next())
                .map(normal);
            if release.is_none() && module.is_none() && !path.ends_with("/modules.builtin") {
                continue;
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(read)?;
            match (release, module) {
                (Some(release), _) => image = Some((release, bytes)),
                (None, Some(module)) => drop(modules.insert(module, bytes)),
                (None, None) => {
                    let text = String::from_utf8_lossy(&bytes);
                    let names = text
                        .lines()
                        .filter_map(|line| line.trim_end_matches(".ko").rsplit('/').next());
                    built_in.extend(names.map(normal));
                }
            }
        }
        let (release, image) = image.ok_or_else(|| KernelError::NoKernel {
            package: file.to_owned(),
        })?;
        let vmlinux = vmlinux::extract(&image).map_err(|err| KernelError::Vmlinux {
            package: file.to_owned(),
            err,
        })?;
        Ok(Self {
            file: file.to_owned(),
            release,
            image,
            vmlinux,
            modules,
            built_in,
        })
    }

    /// Writes the layer: the kernel, and `wanted` with what they depend on, numbered in load order.
    fn store(&self, wanted: &[String], directory: &Utf8Path) -> Result<String, KernelError> {
        let mut order = Vec::new();
        for module in wanted {
            self.order(&normal(module), &mut order)?;
        }
        write(&directory.join("vmlinuz"), &self.image)?;
        write(&directory.join("vmlinux"), &self.vmlinux)?;
        write(&directory.join("release"), self.release.as_bytes())?;
        let modules = directory.join("modules");
        std::fs::create_dir(&modules).map_err(|err| KernelError::Write {
            path: modules.clone(),
            err,
        })?;
        let mut digests = vec![self.release.clone(), digest::of(&self.image)];
        for (index, (name, bytes)) in order.iter().enumerate() {
            let file = format!("{:03}-{name}.ko", (index + 1) * 10);
            write(&modules.join(&file), bytes)?;
            digests.extend([file, digest::of(bytes)]);
        }
        Ok(digest::of_list(digests))
    }

    /// Appends `module` after everything that it depends on.
    fn order<'a>(
        &'a self,
        module: &str,
        order: &mut Vec<(String, &'a [u8])>,
    ) -> Result<(), KernelError> {
        if self.built_in.contains(module) || order.iter().any(|(name, _)| name == module) {
            return Ok(());
        }
        let bytes = self
            .modules
            .get(module)
            .ok_or_else(|| KernelError::NoModule {
                release: format!(
                    "{} ({})",
                    self.release,
                    self.file.file_name().unwrap_or_default()
                ),
                module: module.to_owned(),
            })?;
        for dependency in depends(bytes) {
            self.order(&dependency, order)?;
        }
        order.push((module.to_owned(), bytes));
        Ok(())
    }
}

/// Modules are named with `-` and `_` alike; the kernel shows `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module's `.modinfo` says it depends on. The packaged list of dependencies is made only at installation.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("\x7fELF..\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    fn package() -> Package {
        let modules = [
            ("virtio_blk", "virtio,virtio-ring"),
            ("virtio", "virtio_ring"),
            ("virtio_ring", ""),
            ("loop", "gone"),
        ];
        Package {
            file: "/k.deb".into(),
            release: "6.1".into(),
            image: b"image".to_vec(),
            vmlinux: b"unpacked".to_vec(),
            modules: modules
                .into_iter()
                .map(|(name, depends)| (name.to_owned(), module(depends)))
                .collect(),
            built_in: BTreeSet::from(["ext4".to_owned()]),
        }
    }

    #[test]
    fn modules_come_after_what_they_need_and_built_in_ones_not_at_all() {
        let directory = camino_tempfile::tempdir().unwrap();
        package()
            .store(
                &["ext4".into(), "virtio-blk".into(), "virtio".into()],
                directory.path(),
            )
            .unwrap();
        let kernel = Kernel::open(directory.path()).unwrap();
        assert_eq!(
            kernel.modules,
            ["010-virtio_ring.ko", "020-virtio.ko", "030-virtio_blk.ko"]
        );
        assert_eq!(kernel.drivers(), ["virtio_ring", "virtio", "virtio_blk"]);
        assert!(kernel.initrd(b"agent").unwrap().len() > 600);
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let directory = camino_tempfile::tempdir().unwrap();
        let refused = package()
            .store(&["loop".into()], directory.path())
            .unwrap_err()
            .to_string();
        assert!(refused.contains("`gone`"), "{refused}");
    }
}
