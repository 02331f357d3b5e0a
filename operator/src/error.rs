//! Why a reconcile did not make everything as it is wanted, and what kind of why that is.

use crate::failure::{Class, Failure};
use crate::metrics::Outcome;
use crate::mint::MintError;
use crate::observe::ReadError;

/// Why a reconcile did not make everything as it is wanted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be read, so nothing was decided.
    #[error(transparent)]
    Read(ReadError),
    /// No keys or certificates.
    #[error(transparent)]
    Mint(MintError),
    /// Some children could not be written; their status says which.
    #[error("{} of the model's objects can't be written, the first: {}", .0.len(), .0.first().map_or_else(String::new, ToString::to_string))]
    Children(Vec<Failure>),
    /// The status could not be written.
    #[error("can't write the status: {0}")]
    Status(#[source] kube::Error),
    /// It took longer than it may.
    #[error("took longer than {0} s and was cut off")]
    TimedOut(u64),
    /// It panicked, which is a bug; other models go on.
    #[error("panicked: {0}")]
    Panicked(String),
}

impl Error {
    /// As metrics count it.
    pub fn outcome(&self) -> Outcome {
        match self {
            Error::Read(_) | Error::Mint(_) | Error::Status(_) => Outcome::Unreachable,
            Error::Children(failures) => Outcome::Failed(worst(failures)),
            Error::TimedOut(_) => Outcome::TimedOut,
            Error::Panicked(_) => Outcome::Panicked,
        }
    }

    /// Whether trying again soon is in vain.
    pub fn waits_for_a_person(&self) -> bool {
        match self {
            Error::Children(failures) => !failures.iter().any(|failure| comes_back(failure.class)),
            Error::Read(_) | Error::Mint(_) | Error::Status(_) | Error::TimedOut(_) | Error::Panicked(_) => false,
        }
    }
}

fn comes_back(class: Class) -> bool {
    match class {
        Class::Transient | Class::Conflict => true,
        Class::Refused | Class::Quota | Class::KindMissing | Class::NameTaken => false,
    }
}

/// The class that says most: what a person must act upon before what comes back by itself.
fn worst(failures: &[Failure]) -> Class {
    failures.iter().map(|failure| failure.class).max().unwrap_or(Class::Transient)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::Kind;

    fn error(classes: &[Class]) -> Error {
        let failure = |class: &Class| Failure {
            kind: Kind::Service,
            name: "tiny".to_owned(),
            class: *class,
            message: "no".to_owned(),
        };
        Error::Children(classes.iter().map(failure).collect())
    }

    #[test]
    fn a_child_that_comes_back_by_itself_is_tried_again_soon_whatever_else_failed() {
        assert!(error(&[Class::Refused, Class::Quota]).waits_for_a_person());
        assert!(!error(&[Class::Refused, Class::Conflict]).waits_for_a_person());
        assert_eq!(error(&[Class::Transient, Class::Refused]).outcome(), Outcome::Failed(Class::Refused));
    }
}
