//! How often somebody may do what costs much: start a sign-in, try a password. In memory: each controller counts for itself.
use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use std::{net::IpAddr, num::NonZeroU32, time::Duration};

/// Keys that are remembered; beyond so many, those that are as good as new are forgotten.
const KEYS: usize = 10_000;

/// Attempts by one key: so many at once, and one more each `every`.
#[derive(Debug)]
struct Limit {
    limiter: DefaultKeyedRateLimiter<String>,
    clock: DefaultClock,
}

impl Limit {
    fn new(burst: NonZeroU32, every: Duration) -> Self {
        let quota = Quota::with_period(every)
            .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
            .allow_burst(burst);
        Self {
            limiter: RateLimiter::keyed(quota),
            clock: DefaultClock::default(),
        }
    }

    /// Counts an attempt; how long to wait where it was one too many.
    fn attempt(&self, key: &String) -> Result<(), Duration> {
        if self.limiter.len() > KEYS {
            self.limiter.retain_recent();
        }
        self.limiter
            .check_key(key)
            .map_err(|not_yet| not_yet.wait_time_from(self.clock.now()))
    }
}

const fn at_least_one(count: u32) -> NonZeroU32 {
    match NonZeroU32::new(count) {
        Some(count) => count,
        None => NonZeroU32::MIN,
    }
}

/// The limits of this controller.
#[derive(Debug)]
pub(crate) struct Limits {
    starts: Option<Limit>,
    /// One name from one address: guessing.
    pair: Limit,
    /// One address with many names.
    address: Limit,
    /// One name from many addresses. Wide, for it locks the person out as well.
    name: Limit,
}

impl Limits {
    /// With so many starts a minute by one principal; 0: any number.
    pub(crate) fn new(starts_per_minute: u32) -> Self {
        let starts = NonZeroU32::new(starts_per_minute)
            .map(|count| Limit::new(count, Duration::from_secs(60) / count.get()));
        let seconds = Duration::from_secs;
        Self {
            starts,
            pair: Limit::new(at_least_one(10), seconds(15)),
            address: Limit::new(at_least_one(30), seconds(2)),
            name: Limit::new(at_least_one(50), seconds(10)),
        }
    }

    /// Counts a start by the principal with this id.
    ///
    /// # Errors
    /// One too many; wait for so long.
    pub(crate) fn start(&self, principal: &str) -> Result<(), Duration> {
        match &self.starts {
            Some(limit) => limit.attempt(&principal.to_owned()),
            None => Ok(()),
        }
    }

    /// Counts a visit, from this address, of a page that costs a request elsewhere.
    ///
    /// # Errors
    /// As [`Limits::start`].
    pub(crate) fn page(&self, address: IpAddr) -> Result<(), Duration> {
        self.address.attempt(&address.to_string())
    }

    /// Counts an attempt at a password, whether it is the right one or not.
    ///
    /// # Errors
    /// As [`Limits::start`].
    pub(crate) fn login(&self, address: IpAddr, name: &str) -> Result<(), Duration> {
        // Not a key of any length: who tries chooses the name.
        let name: String = name.chars().take(128).collect();
        self.address.attempt(&address.to_string())?;
        self.pair.attempt(&format!("{address} {name}"))?;
        self.name.attempt(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guessing_is_slow_and_others_are_not_in_its_way() {
        let limits = Limits::new(2);
        let (here, there) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for _ in 0..10 {
            assert_eq!(limits.login(here, "alice"), Ok(()));
        }
        let wait = limits.login(here, "alice").unwrap_err();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_secs(15),
            "{wait:?}"
        );
        assert_eq!(limits.login(there, "alice"), Ok(()), "she herself");
        assert_eq!(limits.login(here, "bob"), Ok(()));
        for i in 0..40 {
            let _ = limits.login(here, &format!("name{i}"));
        }
        assert!(
            limits.login(here, "carol").is_err(),
            "one address, many names"
        );
    }

    #[test]
    fn starts_are_limited_by_who_asks() {
        let limits = Limits::new(2);
        assert_eq!((limits.start("a"), limits.start("a")), (Ok(()), Ok(())));
        assert!(limits.start("a").unwrap_err() <= Duration::from_secs(30));
        assert_eq!(limits.start("b"), Ok(()));
        let free = Limits::new(0);
        assert!((0..1000).all(|_| free.start("a").is_ok()));
    }
}
