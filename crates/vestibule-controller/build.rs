//! Compiles again when the dashboard was built: the macro that embeds it notices changed files, but not a directory that
//! was missing.
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
