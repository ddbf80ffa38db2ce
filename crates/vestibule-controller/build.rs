//! Compiles again when the dashboard was built: the macro that embeds it notices changed files, but not a directory that
//! was missing.
#![expect(clippy::print_stdout, reason = "cargo reads a build script's output")]

fn main() {
    let dist = "../../web/dist";
    // A path that does not exist would mean: again each time. Its parent changes when it appears.
    let watched = if std::path::Path::new(dist).exists() {
        dist
    } else {
        "../../web"
    };
    println!("cargo:rerun-if-changed={watched}");
}
