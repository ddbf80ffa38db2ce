//! A certificate authority of a test's own, and the leaf certificates it issues. The key never leaves the test's folder
//! and the authority is trusted only by the image `browser-test`.
use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
    time::{Duration, SystemTime},
};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate authority, kept in a folder as `ca.pem` and `ca.key`.
#[derive(Debug)]
pub struct TestCa {
    pem: String,
    path: Utf8PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    /// The authority kept in `dir`; made, with the folder, where there is none yet.
    ///
    /// # Errors
    /// When the folder cannot be read or written, or holds something else.
    pub fn in_dir(dir: &Utf8Path) -> Result<Self> {
        let (path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        if !path.exists() {
            std::fs::create_dir_all(dir).with_context(|| format!("make `{dir}`"))?;
            make(&path, &key_path).with_context(|| format!("make a test CA in `{dir}`"))?;
        }
        let pem = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
        let key =
            std::fs::read_to_string(&key_path).with_context(|| format!("read `{key_path}`"))?;
        let key = KeyPair::from_pem(&key).with_context(|| format!("understand `{key_path}`"))?;
        // The subject must be the one in the certificate: both come from `subject()`.
        let issuer = Issuer::new(subject(), key);
        Ok(Self { pem, path, issuer })
    }

    /// The certificate, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Where the certificate lies.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// A TLS server for these names, good from yesterday, because a guest's clock may be behind, for 30 days.
    ///
    /// # Errors
    /// When a name is not one.
    pub fn server(&self, names: &[&str]) -> Result<Arc<rustls::ServerConfig>> {
        self.server_since(names, DAY)
    }

    /// The same with a certificate that was issued so long ago: whose clock is further behind does not trust it yet.
    ///
    /// # Errors
    /// When a name is not one.
    pub fn server_since(&self, names: &[&str], ago: Duration) -> Result<Arc<rustls::ServerConfig>> {
        let (cert, key) = self.leaf(names, ago)?;
        let chain: Vec<CertificateDer<'static>> = vec![cert.der().clone()];
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choose TLS versions")?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("use the certificate")?;
        Ok(Arc::new(config))
    }

    /// The certificate and key of a server with these names, as `cert.pem` and `key.pem` in `dir`.
    ///
    /// # Errors
    /// When a name is not one, or `dir` can't be written to.
    pub fn write_server(&self, names: &[&str], dir: &Utf8Path) -> Result<()> {
        let (cert, key) = self.leaf(names, DAY)?;
        std::fs::write(dir.join("cert.pem"), cert.pem()).context("write a certificate")?;
        write_key(&dir.join("key.pem"), &key).context("write a key")
    }

    fn leaf(&self, names: &[&str], ago: Duration) -> Result<(Certificate, KeyPair)> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).context("name the certificate")?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, ago, 30);
        let key = KeyPair::generate().context("make a key")?;
        let cert = params
            .signed_by(&key, &self.issuer)
            .context("sign the certificate")?;
        Ok((cert, key))
    }
}

fn subject() -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "Vestibule test CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, DAY, 365);
    params
}

fn validity(params: &mut CertificateParams, ago: Duration, days: u32) {
    let now = SystemTime::now();
    params.not_before = (now - ago).into();
    params.not_after = (now + DAY * days).into();
}

fn make(path: &Utf8Path, key_path: &Utf8Path) -> Result<()> {
    let key = KeyPair::generate()?;
    let cert = subject().self_signed(&key)?;
    write_key(key_path, &key)?;
    std::fs::write(path, cert.pem())?;
    Ok(())
}

fn write_key(path: &Utf8Path, key: &KeyPair) -> Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
    Ok(())
}
