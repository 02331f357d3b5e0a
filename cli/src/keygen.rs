//! `baton keygen`: a model's key pair as the two Secrets that its pods mount, for clusters without the operator.
//!
//! Both halves come from one call, since one without the other is of no use; what the operator makes itself has the same names.

use crate::args::KeygenArgs;
use anyhow::Context as _;
use baton_wire::names::files::{SIGNING_KEY, SIGNING_PUBLIC};
use baton_wire::signing::KeyTexts;
use std::io::Write as _;
use std::process::ExitCode;

/// Prints the Secrets.
///
/// # Errors
/// When there is no randomness, or nobody who reads.
pub(crate) fn run(args: &KeygenArgs) -> anyhow::Result<ExitCode> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("no randomness for a key")?;
    let text = secrets(&args.name, &KeyTexts::from_secret(&secret));
    std::io::stdout().write_all(text.as_bytes()).context("can't print")?;
    Ok(ExitCode::SUCCESS)
}

/// The two of a model. Its name is checked, and keys are hexadecimal, so that nothing needs escaping.
fn secrets(name: &str, keys: &KeyTexts) -> String {
    let secret = |suffix: &str, mounted_by: &str, file: &str, text: &str| {
        format!(
            "# {mounted_by}\n\
             apiVersion: v1\n\
             kind: Secret\n\
             metadata:\n  \
               name: {name}-{suffix}\n  \
               labels:\n    \
                 app.kubernetes.io/name: baton\n    \
                 app.kubernetes.io/instance: {name}\n    \
                 app.kubernetes.io/part-of: baton\n\
             type: Opaque\n\
             stringData:\n  \
               {file}: \"{text}\"\n"
        )
    };
    let signing = secret(
        "signing-key",
        "Mounted by routing proxies alone: who has it may use the model.",
        SIGNING_KEY,
        &keys.signing,
    );
    let public = secret("signing-public", "Its public half, mounted by workers.", SIGNING_PUBLIC, &keys.public);
    format!("{signing}---\n{public}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::signing;

    /// The value of a key, as a program reads the mounted file.
    fn value<'a>(document: &'a str, key: &str) -> &'a str {
        let line = document.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(": "));
        line.expect("the key is there").trim_matches('"')
    }

    #[test]
    fn the_secrets_hold_one_key_pair_as_the_programs_read_it() {
        let text = secrets("modelservice", &KeyTexts::from_secret(&[7; 32]));
        let (private, public) = text.split_once("---\n").expect("two documents");
        assert_eq!(value(private, "name"), "modelservice-signing-key");
        assert_eq!(value(public, "name"), "modelservice-signing-public");
        let key = signing::parse_signing_key(value(private, "signing.key")).expect("a key");
        let verifying = signing::parse_verifying_key(value(public, "signing.pub")).expect("a key");
        assert_eq!(key.verifying_key(), verifying);
        assert!(!public.contains(value(private, "signing.key")));
    }
}
