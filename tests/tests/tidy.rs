//! The lines that ARCHITECTURE.md draws, enforced: who may name what, and how a file begins.

use std::path::{Path, PathBuf};
use system_tests::repo;

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a folder of the checkout is readable").path();
            if path.is_dir() {
                let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
                // What is built or installed by hand here is nobody's text of ours.
                if !hidden && !path.ends_with("target") && !path.ends_with("venv") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A file's code: comments may speak of anything.
fn code(path: &Path) -> String {
    read(path).lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn relative(path: &Path) -> String {
    path.strip_prefix(repo::root()).expect("inside the checkout").to_string_lossy().into_owned()
}

/// Fails with every file outside `homes` whose code contains one of `words`.
fn named_only_in(words: &[&str], homes: &[&str]) {
    let strangers: Vec<String> = files(&repo::root(), "rs")
        .iter()
        .filter(|path| !homes.iter().any(|home| relative(path).starts_with(home)))
        .filter(|path| !relative(path).ends_with("tests/tidy.rs"))
        .filter(|path| words.iter().any(|word| code(path).contains(word)))
        .map(|path| relative(path))
        .collect();
    assert!(strangers.is_empty(), "{words:?} belong in {homes:?} only, found in {strangers:#?}");
}

#[test]
fn candle_is_named_in_the_engine_alone() {
    named_only_in(&["candle_core::", "use candle", "cudarc::"], &["worker/engine/"]);
}

#[test]
fn kubernetes_client_types_stay_out_of_the_data_path() {
    // Of the proxy, the one source of addresses that is opt-in, with its tests.
    let discovery = "proxy/src/discovery/endpoint_slices";
    named_only_in(&["kube::", "k8s_openapi::"], &["crds/", "operator/", "cli/", "tests/", discovery]);
}

#[test]
fn only_downloads_of_models_reach_beyond_the_cluster() {
    named_only_in(&["reqwest::", "rusty_s3::"], &["worker/src/fetch"]);
}

#[test]
fn the_web_framework_is_named_at_http_edges_alone() {
    let strangers: Vec<String> = files(&repo::root(), "rs")
        .iter()
        .map(|path| (relative(path), code(path)))
        .filter(|(path, code)| {
            let edge = ["http", "upstream", "client", "progress", "tests/"].iter().any(|word| path.contains(word));
            !edge && ["axum::", "hyper::", "hyper_util::"].iter().any(|word| code.contains(word))
        })
        .map(|(path, _)| path)
        .collect();
    assert!(
        strangers.is_empty(),
        "axum and hyper belong in http*, upstream*, client* and progress* files, found in {strangers:#?}"
    );
}

#[test]
fn no_binary_imports_another_binarys_crate() {
    let allowed: &[(&str, &[&str])] = &[
        ("crds", &[]),
        ("worker/api", &[]),
        ("worker/engine", &[]),
        ("operator", &["baton-crds", "baton-wire"]),
        ("proxy", &["baton-crds", "baton-wire"]),
        ("worker", &["baton-engine", "baton-wire"]),
        ("cli", &["baton-crds", "baton-operator", "baton-wire"]),
    ];
    for (folder, may) in allowed {
        let manifest = read(&repo::root().join(folder).join("Cargo.toml"));
        let imports: Vec<&str> = manifest
            .lines()
            .filter_map(|line| line.split_once(".workspace").map(|(name, _)| name.trim()))
            .filter(|name| name.starts_with("baton-"))
            .collect();
        let wrong: Vec<_> = imports.iter().filter(|name| !may.contains(name)).collect();
        assert!(wrong.is_empty(), "{folder} may import {may:?}, not {wrong:?}");
    }
}

#[test]
fn unsafe_code_is_forbidden_where_it_is_never_needed() {
    for root in
        ["crds/src/lib.rs", "worker/api/src/lib.rs", "operator/src/lib.rs", "proxy/src/lib.rs", "cli/src/main.rs"]
    {
        let text = read(&repo::root().join(root));
        assert!(text.contains("#![forbid(unsafe_code)]"), "{root} lacks #![forbid(unsafe_code)]");
    }
}

#[test]
fn every_unsafe_block_has_its_argument() {
    for path in files(&repo::root(), "rs") {
        let text = read(&path);
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let opens = line.contains("unsafe {") || line.contains("unsafe impl");
            if !opens || line.trim_start().starts_with("//") || relative(&path).ends_with("tests/tidy.rs") {
                continue;
            }
            let argued = lines[number.saturating_sub(8)..=number].iter().any(|line| line.contains("SAFETY:"));
            assert!(argued, "{}:{}: unsafe without a SAFETY comment", relative(&path), number + 1);
        }
    }
}

#[test]
fn every_file_opens_with_what_it_is() {
    let silent: Vec<String> = files(&repo::root(), "rs")
        .iter()
        .filter(|path| !read(path).starts_with("//! "))
        .map(|path| relative(path))
        .collect();
    assert!(silent.is_empty(), "files without an opening //! sentence: {silent:#?}");
}

#[test]
fn nothing_is_left_to_do_without_an_issue() {
    for path in files(&repo::root(), "rs").into_iter().filter(|path| !relative(path).ends_with("tests/tidy.rs")) {
        for (number, line) in read(&path).lines().enumerate() {
            let open = line.contains("TODO") && !line.contains("TODO(#");
            assert!(!open, "{}:{}: TODO without an issue", relative(&path), number + 1);
        }
    }
}

#[test]
fn every_reason_of_the_path_header_is_explained() {
    let page = read(&repo::root().join("docs/troubleshooting.md"));
    for reason in baton_wire::PathReason::ALL {
        assert!(page.contains(&format!("\n| `{reason}` | ")), "docs/troubleshooting.md does not explain {reason}");
    }
}

#[test]
fn every_relative_link_in_the_documents_leads_somewhere() {
    for path in files(&repo::root(), "md") {
        let folder = path.parent().expect("a file lies in a folder");
        for part in read(&path).split("](").skip(1) {
            let target = part.split([')', '#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            assert!(folder.join(target).exists(), "{}: link to {target} leads nowhere", relative(&path));
        }
    }
}
