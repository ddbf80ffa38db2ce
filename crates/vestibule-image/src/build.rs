//! Building an image: the order of the steps, and what of them is cached.
//!
//! ```text
//! packages ─┐
//! tools ────┼▶ tree ▶ checks ▶ root without agent ─▶ + agent ─┐
//! overlay ──┘                                        kernel ──┼▶ manifest ▶ images/<digest>/
//!                                                    initrd ──┘
//! ```
//! Each box is a layer under the key of its inputs. A changed agent touches only what is right of it: the root image is
//! copied, the agent written into it, and the result digested. The image appears in the store by one rename.
use crate::{
    accounts, archive, authority, bootstrap,
    cache::{Cache, CacheError, Layer, Work},
    checks, digest, elf, ext4,
    host::{Host, HostError},
    kernel::{self, Kernel},
    layers::{self, Walked},
    lint::{self, LintError},
    npm,
    progress::{Event, Phase, Progress, Steps},
    recipe::{Recipe, RecipeError, ToolRule},
    sparse,
    store::{BuildRecord, PhaseTime, Store, StoreError},
    tree::{Tree, TreeError},
    units,
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use vestibule_api::{
    finding::Finding,
    ids::ImageDigest,
    image::{Artifact, Manifest, Package, Tool},
    time::Timestamp,
};

/// Raised when the same layers would give another image.
const VERSION: &str = "image 4";
/// One kernel, as QEMU boots it and as Firecracker does.
const KERNELS: [&str; 2] = ["vmlinuz", "vmlinux"];
/// Where the agent stands in every image.
pub const AGENT: &str = "/usr/lib/vestibule/vestibule-agent";
/// The image's facts, for the agent in it.
const FACTS: &str = "/etc/vestibule/image.json";
/// Names under which the agent is what opens a URL, below `/usr/lib/vestibule/bin`.
const SHIMS: [&str; 5] = [
    "open-url",
    "sensible-browser",
    "www-browser",
    "x-www-browser",
    "xdg-open",
];

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Directory of the recipe.
    pub recipe: Utf8PathBuf,
    /// The static agent binary.
    pub agent: Utf8PathBuf,
    /// Files that the recipe asks for by name: a test's certificate authority.
    pub inputs: BTreeMap<String, Utf8PathBuf>,
    /// Install packages and kernel again, as new as the mirror has them.
    pub refresh: bool,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Built {
    pub digest: ImageDigest,
    pub recipe: String,
    /// The same image was in the store already.
    pub unchanged: bool,
    pub took_ms: u64,
    pub phases: Vec<PhaseTime>,
}

/// Why there is no image. Every text names the thing.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::BootstrapError),
    #[error(transparent)]
    Npm(#[from] npm::NpmError),
    #[error(transparent)]
    Check(#[from] checks::CheckError),
    #[error(transparent)]
    Unit(#[from] units::UnitError),
    #[error(transparent)]
    Authority(#[from] authority::AuthorityError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Ext4(#[from] ext4::Ext4Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lint(#[from] LintError),
    #[error(
        "the image of recipe `{recipe}` would not come up, and is not kept: {}: {} ({}); {}",
        finding.cause.id(), finding.why, quoted(finding), finding.fix
    )]
    Broken {
        recipe: String,
        finding: Box<Finding>,
    },
    #[error("assemble the root of recipe `{recipe}`")]
    Tree {
        recipe: String,
        #[source]
        err: TreeError,
    },
    #[error("{what} `{path}`")]
    Io {
        what: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("`{path}` is not a static x86-64 program: run `cargo xtask agent`")]
    Agent { path: Utf8PathBuf },
    #[error("recipe `{recipe}` asks for the file `{name}`: give it with `--input {name}=FILE`")]
    InputMissing { recipe: String, name: String },
    #[error("recipe `{recipe}` does not ask for a file `{name}`")]
    InputUnknown { recipe: String, name: String },
    #[error(
        "tool of provider `{provider}`: neither npm nor dpkg has installed the package `{package}`"
    )]
    ToolPackage { provider: String, package: String },
}

/// The first line that proves a finding, with its place.
fn quoted(finding: &Finding) -> String {
    let Some(quote) = finding.evidence.first() else {
        return String::new();
    };
    let line = quote.line.map(|line| format!(":{line}"));
    format!(
        "{}{}: {}",
        quote.source,
        line.unwrap_or_default(),
        quote.text
    )
}

fn io(what: &'static str, path: &Utf8Path) -> impl FnOnce(std::io::Error) -> BuildError {
    move |err| BuildError::Io {
        what,
        path: path.to_owned(),
        err,
    }
}

/// Builds the image of a recipe into `store`.
///
/// # Errors
/// [`BuildError`]; the build log stays in the cache until the next build of the recipe.
pub fn build(
    store: &Store,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<Built, BuildError> {
    let recipe = Recipe::load(&options.recipe)?;
    let agent = std::fs::read(&options.agent).map_err(io("read the agent", &options.agent))?;
    if elf::format(&agent) != (elf::Format::Elf { interpreter: None }) {
        return Err(BuildError::Agent {
            path: options.agent.clone(),
        });
    }
    let inputs = inputs(&recipe, options)?;
    let cache = Cache::new(store.home());
    let work = cache.work(&recipe.name)?;
    let host = Host::new(&store.build_log(&recipe.name)?, progress)?;
    let run = Run {
        recipe_digest: recipe_digest(&recipe, &inputs)?,
        recipe,
        inputs,
        agent,
        cache: &cache,
        work: &work,
        host: &host,
        store,
        refresh: options.refresh,
        started: Instant::now(),
        times: Vec::new(),
    };
    run.go()
}

/// The files that the recipe asks for, as text.
fn inputs(recipe: &Recipe, options: &BuildOptions) -> Result<BTreeMap<String, String>, BuildError> {
    if let Some(name) = options
        .inputs
        .keys()
        .find(|name| !recipe.authorities.contains(*name))
    {
        return Err(BuildError::InputUnknown {
            recipe: recipe.name.clone(),
            name: name.clone(),
        });
    }
    let read = |name: &String| {
        let missing = || BuildError::InputMissing {
            recipe: recipe.name.clone(),
            name: name.clone(),
        };
        let path = options.inputs.get(name).ok_or_else(missing)?;
        Ok((
            name.clone(),
            std::fs::read_to_string(path).map_err(io("read the input", path))?,
        ))
    };
    recipe.authorities.iter().map(read).collect()
}

/// Digest of everything that the recipe itself takes in: its files, those of its bases, lock files, inputs.
fn recipe_digest(recipe: &Recipe, inputs: &BTreeMap<String, String>) -> Result<String, BuildError> {
    let mut parts = vec![VERSION.to_owned()];
    for directory in &recipe.directories {
        let walked = layers::walk(directory).map_err(|err| BuildError::Tree {
            recipe: recipe.name.clone(),
            err,
        })?;
        for (path, kind) in walked {
            let name = path.strip_prefix(directory).unwrap_or(&path).to_string();
            let (kind, content) = match kind {
                Walked::Directory => continue,
                Walked::Symlink(target) => ("link", target),
                Walked::File { executable, .. } => {
                    let content = digest::of_file(&path).map_err(io("read", &path))?;
                    (if executable { "program" } else { "file" }, content)
                }
            };
            parts.extend([
                directory.file_name().unwrap_or_default().to_owned(),
                name,
                kind.to_owned(),
                content,
            ]);
        }
    }
    parts.extend(
        inputs
            .iter()
            .flat_map(|(name, text)| [name.clone(), digest::of(text.as_bytes())]),
    );
    Ok(digest::of_list(parts))
}

/// What a root without agent is, beside its image: `root.json` in its layer.
#[derive(serde::Serialize, serde::Deserialize)]
struct Root {
    packages: Vec<Package>,
    tools: Vec<Tool>,
    files: BTreeMap<String, String>,
}

/// One build.
struct Run<'a> {
    recipe: Recipe,
    recipe_digest: String,
    inputs: BTreeMap<String, String>,
    agent: Vec<u8>,
    cache: &'a Cache,
    work: &'a Work,
    host: &'a Host<'a>,
    store: &'a Store,
    refresh: bool,
    started: Instant,
    times: Vec<PhaseTime>,
}

impl Run<'_> {
    fn go(mut self) -> Result<Built, BuildError> {
        let packages = self.phase(Phase::Bootstrap, |run| {
            let layer = bootstrap::layer(run.host, run.cache, run.work, &run.recipe, run.refresh)?;
            Ok((layer.cached, layer))
        })?;
        let tools = self.phase(Phase::Tools, |run| {
            let layer = match &run.recipe.npm {
                Some((lock, npm)) => Some(npm::layer(run.host, run.cache, run.work, lock, npm)?),
                None => None,
            };
            Ok((layer.as_ref().is_none_or(|layer| layer.cached), layer))
        })?;
        let root = self.root(&packages, tools.as_ref())?;
        let kernel = self.phase(Phase::Kernel, |run| {
            let layer = kernel::layer(run.host, run.cache, run.work, &run.recipe, run.refresh)?;
            Ok((layer.cached, layer))
        })?;
        let agent_build = digest::of(&self.agent);
        let key = digest::of_list([
            VERSION,
            &self.recipe_digest,
            &root.id,
            &kernel.id,
            &agent_build,
        ]);
        if let Some(digest) = self.store.built(&self.recipe.name, &key)? {
            for phase in [Phase::Agent, Phase::Manifest, Phase::Lint] {
                self.phase(phase, |_| Ok((true, ())))?;
            }
            return Ok(self.built(digest, true));
        }
        let directory = self.work.directory.join("image");
        std::fs::create_dir_all(&directory).map_err(io("create", &directory))?;
        self.phase(Phase::Agent, |run| {
            run.put_agent(&root, &directory).map(|()| (false, ()))
        })?;
        let (digest, manifest) = self.phase(Phase::Manifest, |run| {
            run.manifest(&root, &kernel, agent_build, &directory)
                .map(|made| (false, made))
        })?;
        self.phase(Phase::Lint, |run| {
            match lint::judge(&directory, &manifest)?.finding {
                None => Ok((false, ())),
                Some(finding) => Err(BuildError::Broken {
                    recipe: run.recipe.name.clone(),
                    finding: Box::new(finding),
                }),
            }
        })?;
        let record = BuildRecord {
            built_at: Timestamp::now(),
            took_ms: millis(self.started.elapsed()),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            phases: self.times.clone(),
        };
        let unchanged = self
            .store
            .add(&self.recipe.name, &key, &digest, &directory, &record)?;
        Ok(self.built(digest, unchanged))
    }

    fn built(self, digest: ImageDigest, unchanged: bool) -> Built {
        Built {
            digest,
            recipe: self.recipe.name,
            unchanged,
            took_ms: millis(self.started.elapsed()),
            phases: self.times,
        }
    }

    /// Runs one phase, says so, and notes how long it took.
    fn phase<T>(
        &mut self,
        phase: Phase,
        step: impl FnOnce(&mut Self) -> Result<(bool, T), BuildError>,
    ) -> Result<T, BuildError> {
        let steps = Steps {
            progress: self.host.progress(),
            phases: &Phase::BUILD,
        };
        let running = steps.begin(phase);
        let (cached, value) = step(self)?;
        let took = running.done(cached);
        self.times.push(PhaseTime {
            phase: phase.title().to_owned(),
            cached,
            took_ms: millis(took),
        });
        Ok(value)
    }

    /// The root without agent, from the cache or made.
    fn root(&mut self, packages: &Layer, tools: Option<&Layer>) -> Result<Layer, BuildError> {
        let tools_id = tools.map_or("", |layer| layer.id.as_str());
        let key = digest::of_list([VERSION, &self.recipe_digest, &packages.id, tools_id]);
        let (cache, work) = (self.cache, self.work);
        let mut made = false;
        let layer = cache.layer(work, "root", &key, false, |directory| {
            made = true;
            self.make_root(packages, tools, directory)
                .map(|()| key.clone())
        })?;
        if !made {
            for phase in [Phase::Overlay, Phase::Units, Phase::Checks, Phase::Root] {
                self.phase(phase, |_| Ok((true, ())))?;
            }
        }
        Ok(layer)
    }

    fn make_root(
        &mut self,
        packages: &Layer,
        tools: Option<&Layer>,
        directory: &Utf8Path,
    ) -> Result<(), BuildError> {
        let name = self.recipe.name.clone();
        let tree_error = |err| BuildError::Tree {
            recipe: name.clone(),
            err,
        };
        let mut tree = self.phase(Phase::Overlay, |run| {
            Ok((false, run.overlay(packages, tools).map_err(tree_error)?))
        })?;
        self.phase(Phase::Units, |run| {
            units::apply(&mut tree, &run.recipe.units)?;
            for (name, pem) in &run.inputs {
                authority::add(&mut tree, name, pem)?;
            }
            accounts::add(&mut tree, &run.recipe.users).map_err(tree_error)?;
            Ok((false, ()))
        })?;
        let (installed, tool_versions) = self.phase(Phase::Checks, |run| {
            checks::run(&tree, &run.recipe, AGENT)?;
            let installed = bootstrap::installed(&tree, &run.recipe)?;
            let versions: Result<Vec<Tool>, BuildError> = run
                .recipe
                .tools
                .iter()
                .map(|tool| version(tool, &installed, tools))
                .collect();
            Ok((false, (installed, versions?)))
        })?;
        self.phase(Phase::Root, |run| {
            let e2fs = ext4::E2fs::find(run.host, run.cache, run.work, &run.recipe.suite)?;
            let extent = archive::extent(&tree);
            let (image, progress) = (directory.join("root.ext4"), run.host.progress());
            let mut written = None;
            let made = e2fs.make(&image, extent, &run.recipe_digest, |out| {
                let total = extent.bytes;
                let advance = |done| progress.event(&Event::Advance { done, total });
                written = Some(archive::write(&tree, out, advance));
                Ok(())
            });
            // What the writer could not read is the cause; that mke2fs then saw a cut stream, its effect.
            let files = written
                .transpose()
                .map_err(tree_error)?
                .unwrap_or_default()
                .files;
            made?;
            let root = Root {
                packages: installed,
                tools: tool_versions,
                files,
            };
            write_json(&directory.join("root.json"), &root)?;
            Ok((false, ()))
        })
    }

    /// Packages, then tools, then the overlays and units of the recipes, then links.
    fn overlay(&self, packages: &Layer, tools: Option<&Layer>) -> Result<Tree, TreeError> {
        let mut tree = layers::from_tar(&packages.directory.join("root.tar"))?;
        bootstrap::clean(&mut tree, &self.recipe)?;
        if let (Some(layer), Some((_, npm))) = (tools, &self.recipe.npm) {
            layers::add_directory(
                &mut tree,
                &layer.directory.join("node_modules"),
                &format!("{}/node_modules", npm.into),
            )?;
        }
        for directory in &self.recipe.directories {
            for (from, into) in [("overlay", "/"), ("units", "/usr/lib/systemd/system")] {
                let from = directory.join(from);
                if from.is_dir() {
                    layers::add_directory(&mut tree, &from, into)?;
                }
            }
        }
        for shim in SHIMS {
            tree.put_link(&format!("/usr/lib/vestibule/bin/{shim}"), AGENT)?;
        }
        for (path, target) in &self.recipe.links {
            tree.put_link(path, target)?;
        }
        // What the agent must wait for before it says that it is ready.
        let facts = serde_json::json!({
            "requiredUnits": self.recipe.units.required,
            "features": self.recipe.all_features(),
        });
        tree.put_file(FACTS, facts.to_string().into_bytes(), 0o644)?;
        Ok(tree)
    }

    /// The root image with the agent in it.
    fn put_agent(&self, root: &Layer, directory: &Utf8Path) -> Result<(), BuildError> {
        let image = directory.join("root.ext4");
        sparse::clone_image(&root.directory.join("root.ext4"), &image)
            .map_err(io("copy the root image to", &image))?;
        let e2fs = ext4::E2fs::find(self.host, self.cache, self.work, &self.recipe.suite)?;
        Ok(e2fs.put_program(&image, AGENT, &self.agent)?)
    }

    /// Kernel, initrd and manifest; the digest of the last is the image's.
    fn manifest(
        &self,
        root: &Layer,
        kernel: &Layer,
        agent_build: String,
        directory: &Utf8Path,
    ) -> Result<(ImageDigest, Manifest), BuildError> {
        let kernel = Kernel::open(&kernel.directory)
            .map_err(io("read the kernel's layer", &kernel.directory))?;
        let initrd = directory.join("initrd");
        let bytes = kernel.initrd(&self.agent).map_err(io("make", &initrd))?;
        std::fs::write(&initrd, bytes).map_err(io("write", &initrd))?;
        for name in KERNELS {
            let (from, to) = (kernel.directory.join(name), directory.join(name));
            let bytes = std::fs::read(&from).map_err(io("read", &from))?;
            std::fs::write(&to, bytes).map_err(io("write", &to))?;
        }
        let path = root.directory.join("root.json");
        let bytes = std::fs::read(&path).map_err(io("read", &path))?;
        let mut content: Root = serde_json::from_slice(&bytes).map_err(|err| BuildError::Io {
            what: "understand",
            path,
            err: err.into(),
        })?;
        content.files.insert(AGENT.to_owned(), agent_build.clone());
        let recipe = &self.recipe;
        let manifest = Manifest {
            schema: 1,
            recipe: recipe.name.clone(),
            recipe_digest: self.recipe_digest.clone(),
            artifacts: ["root.ext4", "initrd"]
                .into_iter()
                .chain(KERNELS)
                .map(|name| Ok((name.to_owned(), artifact(&directory.join(name))?)))
                .collect::<Result<_, BuildError>>()?,
            kernel_release: kernel.release.clone(),
            cmdline: recipe.kernel.cmdline.clone(),
            drivers: kernel.drivers(),
            min_memory_mib: recipe.machine.min_memory_mib,
            default_memory_mib: recipe.machine.default_memory_mib,
            default_vcpus: recipe.machine.default_vcpus,
            required_units: recipe.units.required.iter().cloned().collect(),
            features: recipe.all_features(),
            agent_build,
            packages: content.packages,
            tools: content.tools,
            files: content.files,
        };
        let bytes = write_json(&directory.join("manifest.json"), &manifest)?;
        Ok((Store::digest(&bytes), manifest))
    }
}

/// A tool with the version of the package that it is from.
fn version(
    tool: &ToolRule,
    installed: &[Package],
    npm: Option<&Layer>,
) -> Result<Tool, BuildError> {
    let debian = installed
        .iter()
        .find(|package| package.name == tool.package)
        .map(|package| package.version.clone());
    let version = match (debian, npm) {
        (Some(version), _) => version,
        (None, Some(layer)) => npm::version(layer, &tool.package)?,
        (None, None) => {
            let (provider, package) = (tool.provider.clone(), tool.package.clone());
            return Err(BuildError::ToolPackage { provider, package });
        }
    };
    Ok(Tool {
        provider: tool.provider.clone(),
        package: tool.package.clone(),
        version,
        path: tool.path.clone(),
    })
}

fn artifact(path: &Utf8Path) -> Result<Artifact, BuildError> {
    let sha256 = digest::of_file(path).map_err(io("digest", path))?;
    let bytes = path.metadata().map_err(io("measure", path))?.len();
    Ok(Artifact { sha256, bytes })
}

fn write_json<T: serde::Serialize>(path: &Utf8Path, value: &T) -> Result<Vec<u8>, BuildError> {
    let bytes = serde_json::to_vec(value).map_err(|err| BuildError::Io {
        what: "encode",
        path: path.to_owned(),
        err: err.into(),
    })?;
    std::fs::write(path, &bytes).map_err(io("write", path))?;
    Ok(bytes)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
