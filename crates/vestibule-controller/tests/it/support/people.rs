//! Users with a dashboard, and service tokens, as they ask.
use super::api::Api;
use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use serde_json::{Value, json};

pub(crate) const PASSWORD: &str = "correct horse battery staple";

/// A dashboard that is signed in.
pub(crate) struct Person {
    api: Api,
    pub(crate) cookie: String,
}

impl Person {
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.api
            .bare(method, path)
            .header(header::COOKIE, &self.cookie)
            .header(header::ORIGIN, format!("http://{}", self.api.address))
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        let request = self.request(Method::POST, path).json(body);
        request.send().await.unwrap()
    }
}

impl Api {
    /// Makes an organisation.
    pub(crate) async fn organisation(&self, name: &str) {
        let reply = self
            .post("/api/organisations", &json!({ "name": name }))
            .await;
        assert_eq!(reply.status(), StatusCode::CREATED, "{name}");
    }

    /// Makes a user and signs them in.
    pub(crate) async fn user(&self, name: &str, role: &str, organisation: Option<&str>) -> Person {
        let user = json!({ "name": name, "role": role, "organisation": organisation, "password": PASSWORD });
        let reply = self.post("/api/users", &user).await;
        assert_eq!(reply.status(), StatusCode::CREATED, "{name}");
        let reply = self.log_in(name, PASSWORD).await;
        assert_eq!(reply.status(), StatusCode::NO_CONTENT, "{name}");
        let cookie = reply.headers()[header::SET_COOKIE].to_str().unwrap();
        Person {
            api: self.clone(),
            cookie: cookie.split(';').next().unwrap().to_owned(),
        }
    }

    pub(crate) async fn log_in(&self, name: &str, password: &str) -> Response {
        self.bare(Method::POST, "/api/login/password")
            .header(header::ORIGIN, format!("http://{}", self.address))
            .json(&json!({ "name": name, "password": password }))
            .send()
            .await
            .unwrap()
    }

    /// Makes a service token; the API as whoever has it sees it, and the token's id.
    pub(crate) async fn service(
        &self,
        name: &str,
        role: &str,
        organisation: Option<&str>,
    ) -> (Self, String) {
        let token = json!({ "name": name, "role": role, "organisation": organisation });
        let reply = self.post("/api/tokens", &token).await;
        assert_eq!(reply.status(), StatusCode::CREATED, "{name}");
        let reply: Value = reply.json().await.unwrap();
        let api = Self::new(self.address, reply["token"].as_str().unwrap());
        (
            api,
            reply["details"]["tokenId"].as_str().unwrap().to_owned(),
        )
    }
}

/// The code of an error's body.
pub(crate) async fn code(reply: Response) -> String {
    let body: Value = reply.json().await.unwrap();
    body["error"]["code"].as_str().unwrap().to_owned()
}
