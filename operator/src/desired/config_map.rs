//! What routing proxies read while they run.

use super::scope::{Scope, child};
use crate::Disaggregation;
use crate::child::{Child, Kind};
use k8s_openapi::api::core::v1::ConfigMap;
use serde::Serialize;

/// The file's name.
pub(super) const ROUTING_FILE: &str = "routing.json";

/// The policy as the proxy's `--routing-file` reads it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Routing {
    disaggregation: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_uncached_prompt_tokens: Option<u32>,
}

/// The routing policy. A file and not a flag, so that another policy reaches living pods and replaces none.
pub(super) fn routing(scope: &Scope<'_>) -> Child {
    let routing = match &scope.model.disaggregation {
        Disaggregation::Always { .. } => Routing { disaggregation: "always", min_uncached_prompt_tokens: None },
        Disaggregation::Conditional { min_uncached_prompt_tokens, .. } => Routing {
            disaggregation: "conditional",
            min_uncached_prompt_tokens: Some(min_uncached_prompt_tokens.get()),
        },
        Disaggregation::Never => Routing { disaggregation: "never", min_uncached_prompt_tokens: None },
    };
    let text = serde_json::to_string(&routing).expect("a word and a number always serialise");
    let metadata = scope.of_model(scope.model.name.clone());
    let data = [(ROUTING_FILE.to_owned(), text)].into();
    let map = ConfigMap { metadata: metadata.clone(), data: Some(data), ..Default::default() };
    child(Kind::ConfigMap, &metadata, &map)
}
