//! A child that could not be written: which, why, and what kind of why it is.

use crate::child::Kind;

/// A child that could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} {name}: {message}", kind.as_str())]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// What kind of failure it is.
    pub class: Class,
    /// The API server's words, or ours.
    pub message: String,
}

/// The API server's words for an object that its own types can't hold, such as one with a quantity that is none. They come with
/// code 500, which otherwise means trouble that ends by itself.
const UNTYPED: [&str; 3] =
    ["failed to create typed", "failed to convert new object", "unable to convert unstructured object"];

/// What kind of failure it is, by what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The API server did not answer, or not with a verdict: tried again soon, and no condition speaks of it.
    Transient,
    /// The object changed since it was read: read and decided again at once.
    Conflict,
    /// The API server refuses it (as invalid, by a webhook or policy, for want of rights): a person must act.
    Refused,
    /// The namespace's quota has no room for it.
    Quota,
    /// The cluster does not know its kind.
    KindMissing,
    /// An object that somebody else made has its name.
    NameTaken,
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 6] =
        [Class::Transient, Class::Conflict, Class::Refused, Class::Quota, Class::KindMissing, Class::NameTaken];

    /// As metrics and logs spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Class::Transient => "transient",
            Class::Conflict => "conflict",
            Class::Refused => "refused",
            Class::Quota => "quota",
            Class::KindMissing => "kind-missing",
            Class::NameTaken => "name-taken",
        }
    }

    /// What an answer of the API server to a write means.
    pub(crate) fn of(error: &kube::Error) -> Class {
        let kube::Error::Api(status) = error else { return Class::Transient };
        match status.code {
            409 if status.message.contains("AlreadyExists") || status.is_already_exists() => Class::Conflict,
            409 => Class::Conflict,
            403 if status.message.contains("exceeded quota") => Class::Quota,
            // A namespace that is going away takes nothing new; that is not the model's fault, and ends with it.
            403 if status.message.contains("because it is being terminated") => Class::Transient,
            404 => Class::KindMissing,
            // Webhooks answer with codes of their own; 408, 429 and what the server itself breaks at come back by themselves.
            408 | 429 => Class::Transient,
            400..=499 => Class::Refused,
            500 if UNTYPED.iter().any(|words| status.message.contains(words)) => Class::Refused,
            _ => Class::Transient,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn an_object_that_no_type_holds_is_refused_and_other_trouble_of_the_server_passes() {
        let of = |message: &str| Class::of(&kube::Error::Api(Status::failure(message, "").with_code(500).boxed()));
        let quantity = "failed to convert new object (a/b; apps/v1, Kind=Deployment) to proper version: unable to convert \
                        unstructured object to apps/v1, Kind=Deployment: quantities must match the regular expression";
        assert_eq!(of(quantity), Class::Refused);
        assert_eq!(of("etcdserver: request timed out"), Class::Transient);
    }
}
