//! Building for real: Debian packages, e2fsprogs, npm where a recipe has it. Needs mmdebstrap and a package mirror, so it
//! is run with `--ignored`; `target/agent/vestibule-agent` must be there (`cargo xtask agent`).
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::tempdir;
use ext4_view::Ext4;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use vestibule_api::error::Chain;
use vestibule_image::{BuildOptions, Built, Silent, Store, build, lint};

fn workspace() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn options(recipe: &Utf8Path) -> BuildOptions {
    BuildOptions {
        recipe: recipe.to_owned(),
        agent: workspace().join("target/agent/vestibule-agent"),
        inputs: BTreeMap::new(),
        refresh: false,
    }
}

fn built(store: &Store, options: &BuildOptions) -> Built {
    build(store, options, &Silent).unwrap_or_else(|err| panic!("{}", Chain(&err)))
}

#[test]
#[ignore = "bootstraps Debian twice, three minutes"]
fn the_same_packages_give_the_same_image_and_every_file_is_what_the_manifest_says() {
    let home = tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    let tiny = options(&workspace().join("images/tiny"));
    let first = built(&store, &tiny);
    assert!(built(&store, &tiny).unchanged);

    let image = store.inspect(&first.digest).unwrap();
    let root = Ext4::load_from_path(image.directory.join("root.ext4").as_std_path()).unwrap();
    for (path, expected) in &image.manifest.files {
        let bytes = root
            .read(path.as_str())
            .unwrap_or_else(|err| panic!("{path}: {err}"));
        let actual: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(&actual, expected, "{path}");
    }
    let verdict = lint(&store, &first.digest).unwrap();
    assert!(verdict.finding.is_none(), "{verdict:?}");

    // Downloads stay, everything made from them goes.
    for name in ["layers", "built"] {
        std::fs::remove_dir_all(home.path().join("cache").join(name)).unwrap();
    }
    let second = built(&store, &tiny);
    assert_eq!(first.digest, second.digest);
    assert!(
        second
            .phases
            .iter()
            .any(|phase| phase.phase == "packages" && !phase.cached)
    );

    // An agent of other bytes is another image, from the same root.
    let agent = home.path().join("agent");
    let mut bytes = std::fs::read(&tiny.agent).unwrap();
    bytes.push(0);
    std::fs::write(&agent, &bytes).unwrap();
    let third = built(&store, &BuildOptions { agent, ..tiny });
    assert_ne!(third.digest, first.digest);
    assert!(third.took_ms < 15_000, "{} ms", third.took_ms);
    assert!(
        third
            .phases
            .iter()
            .all(|phase| phase.cached || ["agent", "manifest"].contains(&phase.phase.as_str()))
    );
}

/// A recipe on top of `images/tiny`, in a directory of its own.
fn recipe(directory: &Utf8Path, text: &str) -> Utf8PathBuf {
    let recipe = directory.join("broken");
    std::fs::create_dir_all(recipe.join("overlay/usr/bin")).expect("write the recipe");
    std::fs::write(
        recipe.join("recipe.toml"),
        format!("schema = 1\nname = \"broken\"\nbase = \"tiny\"\n{text}"),
    )
    .expect("write the recipe");
    std::os::unix::fs::symlink(workspace().join("images/tiny"), directory.join("tiny"))
        .expect("write the recipe");
    recipe
}

fn refusal(store: &Store, recipe: &Utf8Path) -> String {
    let refused = build(store, &options(recipe), &Silent).expect_err("the build must fail");
    Chain(&refused).to_string()
}

#[test]
#[ignore = "bootstraps Debian, a minute and a half"]
fn what_is_missing_or_a_stub_is_named() {
    let home = tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    for (text, named) in [
        ("packages = [\"no-such-package\"]", "no-such-package"),
        ("authorities = [\"test-ca\"]", "--input test-ca=FILE"),
        ("[units]\nenable = [\"gone.service\"]", "gone.service"),
        (
            "[programs]\n\"/usr/bin/chromium\" = \"elf\"",
            "/usr/bin/chromium",
        ),
        ("[programs]\n\"/usr/bin/none\" = \"elf\"", "/usr/bin/none"),
        (
            "[kernel]\npackage = \"linux-image-cloud-amd64\"\nmodules = [\"nonesuch\"]\ncmdline = \"\"",
            "nonesuch",
        ),
        ("colour = \"blue\"", "colour"),
    ] {
        let directory = tempdir().unwrap();
        let recipe = recipe(directory.path(), text);
        let stub = recipe.join("overlay/usr/bin/chromium");
        std::fs::write(&stub, "#!/bin/sh\nexec /snap/bin/chromium \"$@\"\n").unwrap();
        let why = refusal(&store, &recipe);
        assert!(why.contains(named), "{text}: {why}");
    }
    assert!(
        store.list().unwrap().is_empty(),
        "a failed build left an image"
    );
}
