//! Kernel modules: what the image's builder put under `/modules`, loaded in the order of their names (`010-virtio.ko`).
use rustix::{io::Errno, system::finit_module};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A module that is not in the kernel now. Whether that matters shows when the root disk is looked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error("list the modules in `{}`", path.display())]
    List {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("open the module `{}`", path.display())]
    Open {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("load the module `{}`", path.display())]
    Load {
        path: PathBuf,
        #[source]
        err: Errno,
    },
}

/// Loads every module in `directory`, and returns those that failed. No directory means a kernel with all built in.
pub(crate) fn load_all(directory: &Path) -> Vec<ModuleError> {
    let mut paths = match list(directory) {
        Ok(paths) => paths,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(err) => {
            return vec![ModuleError::List {
                path: directory.to_owned(),
                err,
            }];
        }
    };
    paths.sort();
    paths
        .into_iter()
        .filter_map(|path| load(path).err())
        .collect()
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn load(path: PathBuf) -> Result<(), ModuleError> {
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(err) => return Err(ModuleError::Open { path, err }),
    };
    match finit_module(&file, c"", 0) {
        // Already there, or built into this kernel.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(err) => Err(ModuleError::Load { path, err }),
    }
}
