//! `openapi/vestibule.json` is what the code says. `VESTIBULE_UPDATE=1 cargo test -p vestibule-controller openapi` writes it.
use camino::Utf8Path;

#[test]
fn the_checked_in_document_is_the_codes() {
    let path = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/vestibule.json");
    let mut text = serde_json::to_string_pretty(&vestibule_controller::openapi()).unwrap();
    text.push('\n');
    if std::env::var_os("VESTIBULE_UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == text,
        "openapi/vestibule.json is not the code's: run this test with VESTIBULE_UPDATE=1"
    );
}
