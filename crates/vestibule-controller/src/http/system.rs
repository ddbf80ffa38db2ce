//! Liveness, readiness, reconcilers, metrics.
use super::error::ApiError;
use crate::{
    core::{Shared, off_runtime},
    images, metrics,
    reconcile::{Shelf, place::free_mib},
};
use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use std::sync::Arc;
use vestibule_api::{
    control::{Liveness, Readiness, ReadyCheck, ReconcilerView},
    error::{Chain, ErrorBody},
    machine::DriverChoice,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The process lives.
#[utoipa::path(get, path = "/health", tag = "system", operation_id = "health", security(()),
    responses((status = 200, body = Liveness)))]
pub(super) async fn health() -> Json<Liveness> {
    Json(Liveness {
        status: "ok".to_owned(),
        version: VERSION.to_owned(),
    })
}

/// Whether a sign-in can be started now, and what is missing, by name.
#[utoipa::path(get, path = "/ready", tag = "system", operation_id = "ready",
    responses((status = 200, body = Readiness), (status = 503, body = Readiness)))]
pub(super) async fn ready(
    State(core): State<Shared>,
) -> Result<(StatusCode, Json<Readiness>), ApiError> {
    let mut checks = vec![database(&core).await];
    if core.store.is_shared() {
        checks.push(lease(&core));
    }
    let on_disk = core.clone();
    checks.extend(
        off_runtime(move || {
            [
                vault(&on_disk),
                image(&on_disk),
                driver(&on_disk),
                disk(&on_disk),
            ]
        })
        .await?,
    );
    checks.push(providers(&core));
    checks.push(warm_start(&core));
    checks.push(jail(&core));
    let ready = !core.is_stopping() && checks.iter().all(|check| check.ok);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok((
        status,
        Json(Readiness {
            ready,
            version: VERSION.to_owned(),
            checks,
        }),
    ))
}

fn check(name: &str, result: Result<String, (String, String)>) -> ReadyCheck {
    let (ok, observed, fix) = match result {
        Ok(observed) => (true, observed, None),
        Err((observed, fix)) => (false, observed, Some(fix)),
    };
    ReadyCheck {
        name: name.to_owned(),
        ok,
        observed,
        fix,
    }
}

/// A slow disk is a warning: sign-ins can start all the same, and take their time.
async fn database(core: &Shared) -> ReadyCheck {
    let result = match core.store.ping().await {
        Ok(()) => Ok("answers".to_owned()),
        Err(err) => {
            let chain = Chain(&err).to_string();
            Err(match err.hindrance() {
                Some(hindrance) => {
                    let (what, fix) = hindrance.words();
                    (format!("{what}: {chain}"), fix.to_owned())
                }
                None => (chain, "look at the disk and the database".to_owned()),
            })
        }
    };
    let mut check = check("database", result);
    if let (true, Some((took, ago))) = (check.ok, core.store.pace.slowest()) {
        check.observed = format!(
            "answers; its disk is slow: a change took {:.1} s, {} s ago",
            took.as_secs_f64(),
            ago.as_secs()
        );
        check.fix = Some(
            "look at what else writes to the disk, and at `vestibule_database_commit_seconds` in `/metrics`".to_owned(),
        );
    }
    check
}

/// Whether this controller may act for its host, where controllers share a database.
fn lease(core: &Shared) -> ReadyCheck {
    let result = if core.lease.is_held() {
        Ok("this controller acts for its host".to_owned())
    } else {
        Err((
            "the lease of this host ran out, or another controller has it: nothing is begun"
                .to_owned(),
            "wait until it is taken again; look at the database and at `vestibule host list`"
                .to_owned(),
        ))
    };
    check("lease", result)
}

fn vault(core: &Shared) -> ReadyCheck {
    let vault = Arc::clone(&core.vault);
    let result = vault.list().map_err(|err| {
        (
            Chain(&err).to_string(),
            "restore the vault from a backup".to_owned(),
        )
    });
    check(
        "vault",
        result.and_then(|listing| match listing.damaged.len() {
            0 => Ok(format!(
                "{} credentials, audit log unbroken",
                listing.credentials.len()
            )),
            count => Err((
                format!("{count} records are damaged"),
                "see the log; `vestibule credential rm` removes one".to_owned(),
            )),
        }),
    )
}

fn image(core: &Shared) -> ReadyCheck {
    let alias = &core.config.image;
    let result = core.images.resolve(alias);
    check(
        "image",
        result
            .map(|image| format!("`{alias}` is {}", image.digest.short()))
            .map_err(|err| (Chain(&err).to_string(), images::how_to_make(alias))),
    )
}

/// Whether a VMM is installed; whether it runs here, `vestibule doctor` finds out by running one.
fn driver(core: &Shared) -> ReadyCheck {
    let (name, fix) = match core.config.vm.driver {
        DriverChoice::Auto | DriverChoice::Qemu => {
            ("qemu-system-x86_64", "apt-get install qemu-system-x86")
        }
        DriverChoice::Firecracker => (
            "firecracker",
            "install Firecracker's release where PATH or VESTIBULE_FIRECRACKER finds it",
        ),
    };
    let named = std::env::var_os("VESTIBULE_FIRECRACKER").filter(|_| name == "firecracker");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = named
        .map(std::path::PathBuf::from)
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|path| path.is_file());
    check(
        "driver",
        match found {
            Some(path) => Ok(format!("{} is installed", path.display())),
            None => Err((format!("no {name} in PATH"), fix.to_owned())),
        },
    )
}

fn disk(core: &Shared) -> ReadyCheck {
    let (home, needed) = (&core.config.home, core.config.limits.min_free_mib);
    let fix = || format!("make room on the file system of {home}");
    check(
        "disk-space",
        match free_mib(home) {
            Some(free) if free >= needed => Ok(format!("{free} MiB free")),
            Some(free) => Err((format!("{free} MiB free of {needed} needed"), fix())),
            None => Err((format!("{home} can't be looked at"), fix())),
        },
    )
}

fn providers(core: &Shared) -> ReadyCheck {
    let usable = core
        .packs
        .ids()
        .filter(|id| matches!(core.packs.get(id), Some(Ok(_))))
        .count();
    check(
        "providers",
        match usable {
            0 => Err((
                "no provider pack can be used".to_owned(),
                "vestibule provider check".to_owned(),
            )),
            count => Ok(format!("{count} provider packs can be used")),
        },
    )
}

/// A warning, where VMs are kept apart less than they could be: sign-ins can start all the same.
fn jail(core: &Shared) -> ReadyCheck {
    let warning = core.config.vm.not_jailed.clone();
    let (observed, fix) = warning.unzip();
    ReadyCheck {
        name: "jail".to_owned(),
        ok: true,
        observed: observed.unwrap_or_else(|| "VMs are jailed".to_owned()),
        fix,
    }
}

/// How fast a sign-in starts now. One can be started without, so this is never missing.
fn warm_start(core: &Shared) -> ReadyCheck {
    let shelves = core.stock.shelves();
    let words = |shelf: &Shelf| {
        format!(
            "`{}`: {} of {} VMs ready; {}",
            shelf.alias, shelf.ready, shelf.target, shelf.words
        )
    };
    let all: Vec<_> = shelves.iter().map(words).collect();
    check("warm-start", Ok(all.join(". ")))
}

/// The background tasks and what they did last.
#[utoipa::path(get, path = "/api/reconcilers", tag = "system", operation_id = "reconcilers",
    responses((status = 200, body = [ReconcilerView])))]
pub(super) async fn reconcilers(State(core): State<Shared>) -> Json<Vec<ReconcilerView>> {
    Json(core.statuses.views())
}

/// Numbers for a monitoring system (OpenMetrics text).
#[utoipa::path(get, path = "/metrics", tag = "system", operation_id = "metrics",
    responses((status = 200, content_type = "application/openmetrics-text", body = String), (status = 401, body = ErrorBody)))]
pub(super) async fn metrics(State(core): State<Shared>) -> Result<impl IntoResponse, ApiError> {
    let text = metrics::render(&core).await?;
    Ok((
        [(
            header::CONTENT_TYPE,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )],
        text,
    ))
}
