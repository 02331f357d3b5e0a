//! The container images: whole archives, the same bytes each time, and programs that run with nothing else around them.

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use system_tests::repo;

/// The profile of the test itself: what `make test` has built.
fn profile() -> &'static str {
    let in_release = repo::binary("baton-proxy").to_string_lossy().contains("/release/");
    if in_release { "release" } else { "dev" }
}

fn run(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn assemble(arguments: &[&str]) {
    let script = repo::root().join("scripts/images");
    let mut all = vec!["--profile", profile()];
    all.extend(arguments);
    run(script.to_str().expect("a path of ours is text"), &all, &repo::root());
}

fn path(folder: &Path) -> &str {
    folder.to_str().expect("a temporary path is text")
}

fn json(file: &Path) -> Value {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The blob of a descriptor, its digest and size checked.
fn blob(layout: &Path, descriptor: &Value) -> std::path::PathBuf {
    let digest = descriptor["digest"].as_str().expect("a descriptor has a digest");
    let hash = digest.strip_prefix("sha256:").expect("digests are SHA-256");
    let file = layout.join("blobs/sha256").join(hash);
    let found = run("sha256sum", &[path(&file)], layout);
    assert_eq!(found.split_whitespace().next(), Some(hash));
    assert_eq!(descriptor["size"].as_u64(), Some(file.metadata().expect("the blob is there").len()));
    file
}

#[test]
fn an_archive_is_a_whole_oci_layout_of_an_image_without_rights() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    assemble(&["--out", path(folder.path()), "proxy"]);
    let layout = folder.path().join("layout");
    std::fs::create_dir(&layout).expect("a temporary folder can be written");
    run("tar", &["xf", "../proxy.tar"], &layout);

    assert_eq!(json(&layout.join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let entry = &json(&layout.join("index.json"))["manifests"][0];
    let name = format!("docker.io/baton/proxy:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(entry["annotations"]["io.containerd.image.name"], name.as_str());
    let manifest = json(&blob(&layout, entry));
    let image = json(&blob(&layout, &manifest["config"]));
    assert_eq!(image["config"]["User"], "65532:65532");
    assert_eq!(image["config"]["Entrypoint"][0], "/usr/local/bin/baton-proxy");
    assert_eq!(image["config"]["Labels"]["org.opencontainers.image.licenses"], "Apache-2.0");

    let layers = manifest["layers"].as_array().expect("an image has layers");
    let unpacked = image["rootfs"]["diff_ids"].as_array().expect("an image has unpacked layers");
    assert_eq!(layers.len(), unpacked.len());
    let mut entries = String::new();
    for (layer, unpacked) in layers.iter().zip(unpacked) {
        let file = blob(&layout, layer);
        let found = run("sh", &["-c", "gunzip -c \"$0\" | sha256sum", path(&file)], &layout);
        assert_eq!(
            found.split_whitespace().next(),
            unpacked.as_str().and_then(|digest| digest.strip_prefix("sha256:"))
        );
        entries += &run("tar", &["tzvf", path(&file), "--numeric-owner"], &layout);
    }
    for line in entries.lines() {
        assert!(line.contains(" 0/0 "), "not owned by root: {line}");
        assert!(!line.starts_with("-rws") && !line[..10].contains('S'), "runs with another's rights: {line}");
        let shell = ["/sh", "/bash", "/busybox", "/apt", "/dpkg"].iter().any(|name| line.ends_with(name));
        assert!(!shell, "a shell or package manager: {line}");
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let [first, second] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    for folder in [&first, &second] {
        assemble(&["--out", path(folder.path()), "proxy", "pause"]);
    }
    for image in ["proxy.tar", "pause.tar"] {
        let [first, second] =
            [&first, &second].map(|folder| std::fs::read(folder.path().join(image)).expect("assembled"));
        assert!(first == second, "{image} differs from itself");
    }
}

#[test]
fn every_program_runs_with_nothing_around_it_but_its_image() {
    let is_root = run("id", &["-u"], &repo::root()).trim() == "0";
    if !is_root {
        return system_tests::kube::skip("only root may run a program in a root of its own");
    }
    for image in ["operator", "proxy", "worker"] {
        let root = tempfile::tempdir().expect("a temporary folder");
        assemble(&["--rootfs", path(root.path()), image]);
        // The user that the image names must get at everything in it.
        run("chmod", &["755", path(root.path())], root.path());
        let program = format!("/usr/local/bin/baton-{image}");
        let said = run("chroot", &["--userspec=65532:65532", path(root.path()), &program, "--version"], root.path());
        assert_eq!(said.trim(), format!("baton-{image} {}", env!("CARGO_PKG_VERSION")));
    }
}
