//! `POST /exec`: a command, for engineers.
use super::{Refusal, Shared, engineers_only};
use crate::{process::Program, tool};
use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use std::{collections::BTreeMap, time::Duration};
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser},
    error::Chain,
};

/// A command may run for so long at most, in seconds.
const LIMIT_S: u32 = 3600;

pub(super) async fn run(
    State(agent): Shared,
    headers: HeaderMap,
    Json(request): Json<ExecRequest>,
) -> Result<Json<ExecReply>, Refusal> {
    engineers_only(&agent, &headers)?;
    if !(1..=LIMIT_S).contains(&request.timeout_s) {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("timeoutS is not within 1 and {LIMIT_S}"),
        ));
    }
    let guest = &agent.guest;
    let program = match request.user {
        ExecUser::Person => Program {
            argv: request.argv,
            env: tool::base_environment(guest),
            directory: guest.home.clone(),
            user: guest.person.clone(),
        },
        ExecUser::Root => Program {
            argv: request.argv,
            env: BTreeMap::from([
                ("HOME".to_owned(), "/root".to_owned()),
                (
                    "PATH".to_owned(),
                    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
                ),
                ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ]),
            directory: "/".into(),
            user: None,
        },
    };
    let ran = program
        .run(
            request.stdin.as_bytes(),
            Duration::from_secs(request.timeout_s.into()),
        )
        .await
        .map_err(|err| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Chain(&err).to_string()))?;
    Ok(Json(ExecReply {
        code: ran.code,
        signal: ran.signal,
        stdout: ran.stdout,
        stderr: ran.stderr,
        truncated: ran.truncated,
        timed_out: ran.timed_out,
    }))
}
