//! Pages of a sign-in: who asks for one, whether the pack allows it, and that it is opened.
use super::{Driver, End, PAGES, failed};
use crate::{
    browser::{self, BrowserError},
    login::{
        callback::{Callback, LOOK_EVERY},
        failure::observed,
        screen,
        url::{self, UrlError},
    },
    shim::OpenRequest,
};
use ::url::Url;
use tokio::{task::JoinError, time::Instant};
use vestibule_api::{
    agent::{LoginEvent, UrlSource},
    cause::Cause,
    error::Chain,
    pack::UrlFrom,
};

impl Driver {
    pub(super) fn shim_asks(&mut self, OpenRequest { url, answer }: OpenRequest) {
        let wanted = self
            .flow
            .url
            .as_ref()
            .is_some_and(|rule| rule.sources.contains(&UrlFrom::Shim));
        let result = match self.allowed(&url) {
            _ if !wanted => {
                Err("this way of signing in takes no page from the tool's opener".to_owned())
            }
            _ if self.pages >= PAGES => Err("this sign-in has opened too many pages".to_owned()),
            Ok(url) => {
                self.take(UrlSource::Shim, url);
                Ok(())
            }
            Err(err) => Err(err.to_string()),
        };
        if let Err(why) = &result {
            let host = Url::parse(&url)
                .map(|url| url::host_of(&url))
                .unwrap_or_default();
            self.refused = Some(format!("a page on `{host}` was not opened: {why}"));
            self.agent.events.login(LoginEvent::UrlRefused {
                source: UrlSource::Shim,
                host,
                why: why.clone(),
            });
        }
        // A shim that has gone away needs no answer.
        let _ = answer.send(result);
    }

    pub(super) fn allowed(&self, url: &str) -> Result<Url, UrlError> {
        let rule = self
            .flow
            .url
            .as_ref()
            .ok_or_else(|| UrlError::Host("any".to_owned()))?;
        url::check(rule, url)
    }

    /// A page that the tool wants opened, by the pack's rule.
    pub(super) fn take(&mut self, source: UrlSource, url: Url) {
        let (host, path) = (url::host_of(&url), url.path().to_owned());
        self.source = Some(source);
        self.timers.fallback = None;
        // The agent's own client has its callback here.
        if self.tool.is_some() {
            self.callback = Callback::of(&url);
            let look = self.callback.is_some();
            self.timers.callback = look.then(|| Instant::now() + LOOK_EVERY);
        }
        self.agent
            .events
            .login(LoginEvent::UrlCaptured { source, host, path });
        self.open(url);
    }

    pub(super) fn open(&mut self, url: Url) {
        if self.pages < PAGES {
            self.pages += 1;
            let guest = self.agent.guest.clone();
            self.opening
                .spawn(async move { browser::open(&guest, &url).await });
        }
    }

    pub(super) fn opened(
        &self,
        result: Result<Result<(), BrowserError>, JoinError>,
    ) -> Option<End> {
        match result {
            Ok(Ok(())) => {
                self.agent.events.login(LoginEvent::BrowserOpened);
                None
            }
            Ok(Err(err)) => {
                let cause = if matches!(err, BrowserError::None) {
                    Cause::BrowserMissing
                } else {
                    Cause::BrowserNotReady
                };
                Some(failed(observed(cause, "browser", &Chain(&err).to_string())))
            }
            Err(_) => None,
        }
    }

    /// A page from a hyperlink or the screen's text, and whether its source is the pack's first.
    pub(super) fn candidate(&self) -> Option<(bool, UrlSource, Url)> {
        let (rule, terminal) = (self.flow.url.as_ref()?, self.terminal()?);
        rule.sources.iter().enumerate().find_map(|(index, from)| {
            let (source, found) = match from {
                UrlFrom::Shim => return None,
                UrlFrom::Osc8 => (UrlSource::Osc8, terminal.emulator().links()),
                UrlFrom::Screen => (
                    UrlSource::Screen,
                    screen::urls(rule, &terminal.emulator().unwrapped()),
                ),
            };
            let url = found.iter().find_map(|text| url::check(rule, text).ok())?;
            Some((index == 0, source, url))
        })
    }

    /// No preferred source has given a page in time.
    pub(super) fn fall_back(&mut self) {
        if let (None, Some((_, source, url))) = (self.source, self.candidate()) {
            self.take(source, url);
        }
    }
}
