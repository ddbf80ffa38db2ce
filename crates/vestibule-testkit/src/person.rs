//! What a person does in front of a session's screen: looks for the page, clicks, types. Nothing here knows more than
//! the pixels show.
use crate::{
    rfb::{Area, Frame, Rfb},
    vendor::{ALLOW_RGB, DENY_RGB, FIELD_RGB},
};
use anyhow::{Context, Result};
use camino::Utf8PathBuf;
use std::time::Duration;

/// Background of the password field of the identity provider's page (`tests/idp/pages.mjs`); its login field has
/// [`FIELD_RGB`].
const PASSWORD_RGB: [u8; 3] = [0xff, 0xd9, 0xa0];
/// A control has at least so many pixels of its colour.
const CONTROL: usize = 2000;
/// How long a page may take to appear: software emulation on two cores draws slowly.
const PAGE: Duration = Duration::from_secs(180);

/// A person in front of a screen, who keeps pictures of what they saw.
#[derive(Debug)]
pub struct Person<'a> {
    rfb: &'a Rfb,
    pictures: Utf8PathBuf,
    taken: u32,
}

impl<'a> Person<'a> {
    /// Somebody who looks at `rfb` and keeps pictures in `pictures`.
    pub fn at(rfb: &'a Rfb, pictures: Utf8PathBuf) -> Self {
        Self {
            rfb,
            pictures,
            taken: 0,
        }
    }

    /// Keeps a picture of the screen.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn picture(&mut self, what: &str) -> Result<()> {
        self.taken += 1;
        let name = format!("{:02}-{what}.png", self.taken);
        self.rfb.frame().save(&self.pictures.join(name))
    }

    /// Waits for a control of this colour that has stopped moving, and clicks its middle.
    async fn click_on(&mut self, what: &str, rgb: [u8; 3]) -> Result<()> {
        let mut last: Option<Area> = None;
        let still = |frame: &Frame| {
            let area = frame.area(rgb).filter(|area| area.pixels >= CONTROL);
            let same = area.is_some() && area == last;
            last = area;
            area.filter(|_| same)
        };
        let found = self.rfb.wait_for(what, PAGE, still).await;
        self.picture(what).context("keep a picture")?;
        let (x, y) = found?.middle();
        self.rfb.click(x, y).await
    }

    /// Presses *Allow*.
    ///
    /// # Errors
    /// When no such control appears.
    pub async fn allow(&mut self) -> Result<()> {
        self.click_on("allow", ALLOW_RGB).await
    }

    /// Presses *Deny*.
    ///
    /// # Errors
    /// When no such control appears.
    pub async fn deny(&mut self) -> Result<()> {
        self.click_on("deny", DENY_RGB).await
    }

    /// Types a device code into the page's field and presses *Continue*.
    ///
    /// # Errors
    /// When the page does not appear.
    pub async fn enter_code(&mut self, code: &str) -> Result<()> {
        self.click_on("code", FIELD_RGB).await?;
        self.rfb.type_text(code).await?;
        self.rfb.type_text("\n").await?;
        // The consent page has the same *Allow*; what tells it apart is *Deny*.
        self.rfb
            .wait_for_colour("the consent page", DENY_RGB, CONTROL, PAGE)
            .await
            .map(drop)
    }

    /// Signs in at the identity provider with login and password.
    ///
    /// # Errors
    /// When the page does not appear.
    pub async fn sign_in(&mut self, login: &str, password: &str) -> Result<()> {
        self.click_on("login", FIELD_RGB).await?;
        self.rfb.type_text(login).await?;
        self.click_on("password", PASSWORD_RGB).await?;
        self.rfb.type_text(password).await?;
        self.rfb.type_text("\n").await
    }
}
