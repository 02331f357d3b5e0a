//! From a manifest to tokens on a real node: the operator runs from its own image, its model's prompts are prefilled in one pod
//! and decoded in another, and in the end everything is gone again.
//!
//! `make e2e` runs it. It needs root on Debian, and says what it lacks elsewhere.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use system_tests::kube::node::{Node, Traces};
use system_tests::kube::{Background, ControlPlane, Forward, Namespace, Tier, say, skip};
use system_tests::operator::wait;
use system_tests::{http, repo};

/// The whole of it, once everything is built.
const WHOLE: Duration = Duration::from_secs(300);
/// Longest wait for one step; each takes seconds on two cores without anything beside it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the operator is, as docs/install.md has it.
const SYSTEM: &str = "baton-system";
const CHAT: &str = "/v1/chat/completions";
const PREFILLS: &str = "llm-d.ai/role=prefill";
const DECODES: &str = "llm-d.ai/role=decode";

/// Clients that stream one completion after the other while their pod ends, and the tokens of each stream.
const STREAMS: usize = 3;
const STREAM_TOKENS: u32 = 400;

/// Kinds of which Kubernetes itself makes objects whenever it likes; the operator's Lease stays, as docs/install.md says.
const ITS_OWN: [&str; 5] = ["APIService", "EndpointSlice", "Event", "IPAddress", "Lease"];

#[test]
#[ignore = "takes a minute or two and root: make e2e runs it, and CI after make test"]
fn one_manifest_becomes_tokens_of_two_pods_and_all_of_it_goes_without_a_trace() -> Result<()> {
    if let Some(lacking) = lacking() {
        skip(&lacking);
        return Ok(());
    }
    let Some(plane) = ControlPlane::start(Tier::Node).or_skip() else { return Ok(()) };
    let Some(node) = Node::start(&plane)? else { return Ok(()) };
    // Without the time for which another node had its turn.
    let (startup, begun) = (plane.startup() + node.startup(), Instant::now());
    say(&format!("e2e: control plane and node: ready after {:.1} s", startup.as_secs_f64()));
    let traces = Traces::of(&plane)?;
    let kinds: BTreeSet<&str> = traces.look()?.into_iter().map(|(kind, _)| kind).collect();
    for kind in ["folder", "link", "route", "cgroup", "process"] {
        ensure!(kinds.contains(kind), "a node that runs leaves a {kind}, and it is not seen: {kinds:?}");
    }

    let namespace = plane.restricted_namespace("e2e")?;
    let story = Story { plane: &plane, node: &node, namespace: &namespace };
    let told = story.tell();
    told.with_context(|| story.diagnosis())?;

    let step = Step::begin("node and control plane: gone");
    drop((namespace, node));
    drop(plane);
    let left = traces.look()?;
    ensure!(left.is_empty(), "left behind: {left:#?}");
    step.done();
    let took = startup + begun.elapsed();
    say(&format!("e2e: all in {:.1} s", took.as_secs_f64()));
    ensure!(took < WHOLE, "it took {took:?}, and {WHOLE:?} is promised");
    Ok(())
}

/// What this machine lacks for making images; what it lacks for a node says the node.
fn lacking() -> Option<String> {
    let runs = |program: &&str| Command::new(program).arg("--version").output().is_ok_and(|ran| ran.status.success());
    let missing: Vec<&str> = ["python3", "strip", "ldd"].into_iter().filter(|program| !runs(program)).collect();
    (!missing.is_empty()).then(|| format!("making the images needs {}", missing.join(", ")))
}

/// A step, and how long it takes.
struct Step {
    name: &'static str,
    begun: Instant,
}

impl Step {
    fn begin(name: &'static str) -> Self {
        Step { name, begun: Instant::now() }
    }

    fn done(self) {
        say(&format!("e2e: {} after {:.1} s", self.name, self.begun.elapsed().as_secs_f64()));
    }
}

/// What a person does, from the installation to its end.
struct Story<'a> {
    plane: &'a ControlPlane,
    node: &'a Node<'a>,
    namespace: &'a Namespace,
}

impl Story<'_> {
    fn tell(&self) -> Result<()> {
        let step = Step::begin("images: assembled and on the node");
        self.import_images()?;
        step.done();

        // Its Pod Security is the strictest, which `helm --create-namespace` alone would not ask for.
        let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
        let system =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": SYSTEM, "labels": labels } });
        self.plane.kubectl_with(&["apply", "-f", "-"], &system.to_string())?.ok()?;
        let volume = self.bring_the_model()?;
        let before = self.inventory()?;
        let audit = self.plane.audit()?;

        let step = Step::begin("operator: installed by Helm and ready");
        let install = ["install", "baton", "charts/baton", "--namespace", SYSTEM, "--wait", "--timeout", "120s"];
        self.plane.helm(&install)?.ok()?;
        step.done();
        let installed = self.inventory()?;

        let step = Step::begin("model: Ready");
        self.kubectl(&["apply", "-f", "examples/tiny.yaml"])?;
        self.kubectl(&["wait", "--for=condition=Ready", "disaggregatedmodel/tiny", "--timeout=120s"])?;
        step.done();
        self.ask_kubectl()?;

        let step = Step::begin("chat: streamed, prefilled in one pod and decoded in another, as both pods' logs say");
        self.chat_by_service()?;
        self.chat_by_forwarded_port()?;
        step.done();

        let step = Step::begin("prefill: scaled to 2 while requests go on, and both take work");
        self.scale_prefill()?;
        step.done();

        let step = Step::begin("decode pod: deleted in the middle of streams, which it finished, and replaced");
        self.stop_the_decode_pod()?;
        step.done();

        let everywhere = self.plane.kubectl(&["get", "pods", "-A", "-o", "json"])?.ok()?;
        let pods = pods_of(&serde_json::from_str(&everywhere)?)?;
        ensure!(pods.iter().all(|pod| pod.restarts == 0), "something was restarted: {pods:?}");

        let step = Step::begin("model: deleted, with all that it had");
        self.kubectl(&["delete", "disaggregatedmodel/tiny", "--timeout=60s"])?;
        self.wait_inventory(&installed)?;
        step.done();

        let requests = audit.requests_of(&format!("system:serviceaccount:{SYSTEM}:baton-operator"))?;
        let forbidden: Vec<_> = requests.iter().filter(|request| request.is_forbidden()).collect();
        ensure!(!requests.is_empty() && forbidden.is_empty(), "of {} requests: {forbidden:?}", requests.len());

        let step = Step::begin("operator: uninstalled");
        self.plane.helm(&["uninstall", "baton", "--namespace", SYSTEM, "--wait", "--timeout", "120s"])?.ok()?;
        let mut stays = before;
        stays.insert("CustomResourceDefinition <none> disaggregatedmodels.baton.dev".to_owned());
        self.wait_inventory(&stays)?;
        step.done();
        drop(volume);
        Ok(())
    }

    /// kubectl in the model's namespace.
    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let all = [&["-n", self.namespace.name()], arguments].concat();
        self.plane.kubectl(&all)?.ok().with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    fn import_images(&self) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let is_release = repo::binary("baton-worker").to_string_lossy().contains("/release/");
        let mut images = Command::new(repo::root().join("scripts/images"));
        images.args(["--profile", if is_release { "release" } else { "dev" }, "--out"]).arg(folder.path());
        let ran = images.output()?;
        ensure!(ran.status.success(), "scripts/images: {}", String::from_utf8_lossy(&ran.stderr));
        for image in ["operator", "proxy", "worker"] {
            self.node.import_image(&folder.path().join(format!("{image}.tar")))?;
        }
        Ok(())
    }

    /// The demo model on a volume, bound to the claim that the manifest names.
    fn bring_the_model(&self) -> Result<tempfile::TempDir> {
        let folder = tempfile::tempdir()?;
        // The pods' user is nobody on this machine.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
        let model = folder.path().join("tiny");
        std::fs::create_dir(&model)?;
        for entry in std::fs::read_dir(repo::demo_model())? {
            let entry = entry?;
            let copy = model.join(entry.file_name());
            std::fs::copy(entry.path(), &copy)?;
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o644))?;
        }
        std::fs::set_permissions(&model, std::fs::Permissions::from_mode(0o755))?;
        let objects = json!({
            "apiVersion": "v1",
            "kind": "List",
            "items": [volume(self.namespace.name(), folder.path()), claim()],
        });
        self.plane.kubectl_with(&["-n", self.namespace.name(), "apply", "-f", "-"], &objects.to_string())?.ok()?;
        self.kubectl(&["wait", "--for=jsonpath={.status.phase}=Bound", "pvc/models", "--timeout=60s"])?;
        Ok(folder)
    }

    /// What kubectl tells of a model.
    fn ask_kubectl(&self) -> Result<()> {
        let table = self.kubectl(&["get", "dm"])?;
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        let [head, row] = rows.as_slice() else { bail!("one model is listed: {table}") };
        ensure!(head.as_slice() == ["NAME", "READY", "REASON", "PREFILL", "DECODE", "AGE"], "{table}");
        ensure!(row[..5] == ["tiny", "True", "AllRolesReady", "1/1", "1/1"], "{table}");
        ensure!(table.lines().all(|line| line.trim_end().len() <= 80), "wider than a terminal: {table}");
        let words = self.kubectl(&["explain", "dm.spec.prefill"])?;
        for word in ["KIND:       DisaggregatedModel", "FIELD: prefill", "kvCacheMemory", "Default: `1Gi`"] {
            ensure!(words.contains(word), "kubectl explain does not say {word:?}: {words}");
        }
        ensure!(self.pods(PREFILLS)?.len() == 1 && self.pods(DECODES)?.len() == 1, "one pod of each role");
        Ok(())
    }

    /// A client's way: the Service's address, through kube-proxy's tables.
    fn chat_by_service(&self) -> Result<()> {
        let (prefill, decode) = (self.pod(PREFILLS)?, self.pod(DECODES)?);
        let address = self.service()?;
        // A decode pod serves alone until its proxy has found the other pods, by names that it looks up every second.
        wait(PATIENCE, "the decode pod's proxy has found the prefill pod", || {
            let chat = Chat::stream(&address, "e2e-first", 4)?;
            ensure!(
                ["remote-prefill", "local-prefill; reason=no-prefill-worker"].contains(&chat.path.as_str()),
                "{chat:?}"
            );
            Ok((chat.path == "remote-prefill").then_some(()))
        })?;
        let chat = Chat::stream(&address, "e2e-service", 48)?;
        chat.is_handed_over(&prefill, &decode)?;
        ensure!(chat.completion_tokens == 48 && chat.prompt_tokens > 64, "{chat:?}");
        ensure!(chat.pieces >= 8, "48 tokens came in {} pieces: not a stream", chat.pieces);

        // Logs reach the API server a moment later than the client its answer.
        wait(PATIENCE, "the prefill pod's log names the request", || {
            let log = self.node.logs(self.namespace.name(), &prefill.name, "engine")?;
            Ok(line_of(&log, "prefilled", |line| line["span"]["id"] == "e2e-service"))
        })?;
        let line = wait(PATIENCE, "the decode pod's log names the request", || {
            let log = self.node.logs(self.namespace.name(), &decode.name, "routing-proxy")?;
            Ok(line_of(&log, "request", |line| line["fields"]["request_id"] == "e2e-service"))
        })?;
        let fields = &line["fields"];
        ensure!(fields["path"] == "remote-prefill" && fields["status"] == 200, "{line}");
        ensure!(fields["prefill_worker"] == prefill.address() && fields["decode_worker"] == decode.address(), "{line}");
        Ok(())
    }

    /// A person's way.
    fn chat_by_forwarded_port(&self) -> Result<()> {
        let forward = Forward::to_service(self.plane, self.namespace.name(), "tiny", 8000)?;
        let chat = Chat::stream(forward.address(), "e2e-forwarded", 16)?;
        chat.is_handed_over(&self.pod(PREFILLS)?, &self.pod(DECODES)?)
    }

    fn scale_prefill(&self) -> Result<()> {
        let before = self.pods("app.kubernetes.io/part-of=baton")?;
        let address = self.service()?;
        let (enough, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (workers, answers) = mpsc::channel();
        std::thread::scope(|scope| {
            let traffic = scope.spawn(|| -> Result<()> {
                while !enough.load(Ordering::Relaxed) {
                    let number = asked.fetch_add(1, Ordering::Relaxed);
                    let chat = Chat::stream(&address, &format!("e2e-scaling-{number}"), 4)?;
                    ensure!(chat.path == "remote-prefill" && chat.completion_tokens == 4, "{chat:?}");
                    // Nobody listens any more once both have been seen.
                    let _ = workers.send(chat.prefill_worker);
                }
                Ok(())
            });
            let scaled = self.see_prefill_scaled(&answers);
            enough.store(true, Ordering::Relaxed);
            let served = traffic.join().expect("it does not panic");
            scaled.and(served)
        })?;
        say(&format!("e2e: {} requests while prefill was scaled, none failed", asked.load(Ordering::Relaxed)));
        let after = self.pods("app.kubernetes.io/part-of=baton")?;
        for pod in &before {
            ensure!(after.contains(pod), "{pod:?} was replaced or restarted: {after:?}");
        }
        ensure!(after.iter().all(|pod| pod.restarts == 0), "restarted: {after:?}");
        Ok(())
    }

    fn see_prefill_scaled(&self, answers: &mpsc::Receiver<String>) -> Result<()> {
        let patch = r#"{"spec":{"prefill":{"replicas":2}}}"#;
        self.kubectl(&["patch", "dm", "tiny", "--type=merge", "-p", patch])?;
        self.kubectl(&["wait", "dm/tiny", "--for=jsonpath={.status.summary.prefill}=2/2", "--timeout=120s"])?;
        self.kubectl(&["wait", "dm/tiny", "--for=condition=Ready", "--timeout=60s"])?;
        let both: BTreeSet<String> = self.pods(PREFILLS)?.iter().map(Pod::address).collect();
        ensure!(both.len() == 2, "two prefill pods: {both:?}");
        let mut seen = BTreeSet::new();
        let deadline = Instant::now() + PATIENCE;
        while seen != both {
            let left = deadline.saturating_duration_since(Instant::now());
            let worker = answers.recv_timeout(left).with_context(|| format!("{seen:?} of {both:?} took work"))?;
            seen.insert(worker);
        }
        Ok(())
    }

    /// What "Stopping pods" promises, seen from outside: streams end whole, the pod says that it drains, the sidecar goes last.
    fn stop_the_decode_pod(&self) -> Result<()> {
        let pod = self.pod(DECODES)?;
        let log = |container| {
            let arguments = ["logs", "-n", self.namespace.name(), &pod.name, "-c", container, "--follow"];
            Background::kubectl(self.plane, &arguments)
        };
        let (mut engine, mut proxy) = (log("engine")?, log("routing-proxy")?);
        let watch = ["get", "pod", &pod.name, "-n", self.namespace.name(), "--watch", "-o", "json"];
        let watch = Background::kubectl(self.plane, &watch)?;
        let address = self.service()?;
        let (begun, enough) = (AtomicUsize::new(0), AtomicBool::new(false));
        let drained = std::thread::scope(|scope| -> Result<Instant> {
            let client = |number| Self::stream_until_it_ends(number, &address, &pod, &begun, &enough);
            let clients: Vec<_> = (0..STREAMS).map(|number| scope.spawn(move || client(number))).collect();
            let drained = self.see_it_drain(&pod, &begun);
            // Where that failed they would go on for ever.
            enough.store(drained.is_err(), Ordering::Relaxed);
            let served = clients.into_iter().map(|client| client.join().expect("it does not panic"));
            let served = served.collect::<Result<Vec<_>>>();
            let (drained, served) = (drained?, served?.concat());
            let across = served.iter().filter(|(from, to)| *from < drained && drained < *to).count();
            say(&format!("e2e: {} streams, all whole, {across} of them while the pod began to drain", served.len()));
            ensure!(across > 0, "no stream ran when the pod began to drain");
            Ok(drained)
        })?;
        say(&format!("e2e: the last stream ended {:.1} s after that", drained.elapsed().as_secs_f64()));
        let (engine, proxy) = (engine.ended(PATIENCE)?, proxy.ended(PATIENCE)?);
        let last = |log: &str| log.lines().rev().find_map(|line| time_of(&parsed(line)?));
        let engines_last = last(&engine).context("the engine's log has times")?;
        let drains = line_of(&proxy, "draining", |_| true).context("the proxy was told to end")?;
        ensure!(time_of(&drains).is_some_and(|time| time >= engines_last), "the sidecar was told first: {drains}");
        let ends = wait(PATIENCE, "both containers ended, as the pod's status says", || {
            let said = watch.said()?;
            let states = serde_json::Deserializer::from_str(&said).into_iter::<Value>().map_while(Result::ok);
            Ok(states.filter_map(|pod| ends(&pod)).last())
        })?;
        let [engine, proxy] = &ends;
        ensure!(engine["exitCode"] == 0 && proxy["exitCode"] == 0, "they ended in peace: {ends:?}");
        ensure!(engine["finishedAt"].as_str() <= proxy["finishedAt"].as_str(), "the sidecar went first: {ends:?}");

        wait(PATIENCE, "the pod is gone", || Ok((!self.pods(DECODES)?.iter().any(|one| one == &pod)).then_some(())))?;
        self.kubectl(&["wait", "dm/tiny", "--for=condition=Ready", "--timeout=120s"])?;
        let chat = wait(PATIENCE, "its successor serves", || Chat::stream(&address, "e2e-successor", 4).map(Some))?;
        ensure!(chat.path == "remote-prefill" && chat.decode_worker == self.pod(DECODES)?.address(), "{chat:?}");
        Ok(())
    }

    /// Streams one completion after the other until the pod takes no more, and gives from when to when each ran: the first
    /// through the Service, the later ones from the pod itself, which leaves the Service as soon as it is deleted.
    fn stream_until_it_ends(
        number: usize,
        service: &str,
        pod: &Pod,
        begun: &AtomicUsize,
        enough: &AtomicBool,
    ) -> Result<Vec<(Instant, Instant)>> {
        let (own, mut ran) = (pod.address(), Vec::new());
        while !enough.load(Ordering::Relaxed) {
            let from = Instant::now();
            let id = format!("e2e-end-{number}-{}", ran.len());
            let answer = match Chat::ask(if ran.is_empty() { service } else { &own }, &id, STREAM_TOKENS) {
                Ok(answer) => answer,
                // It has ended, as was asked of it; before that it answers.
                Err(error) if ran.is_empty() => return Err(error),
                Err(_) => break,
            };
            if answer.status == 503 && !ran.is_empty() {
                ensure!(answer.header("retry-after").is_some(), "refused without a word of when to come again");
                break;
            }
            begun.fetch_add(1, Ordering::Relaxed);
            let chat = Chat::read(&id, answer)?;
            ensure!(chat.completion_tokens == STREAM_TOKENS as usize, "cut off: {chat:?}");
            if chat.decode_worker != own {
                // Given to its successor.
                ensure!(!ran.is_empty(), "the Service leads to another pod: {chat:?}");
                break;
            }
            ran.push((from, Instant::now()));
        }
        Ok(ran)
    }

    /// Deletes a pod when all clients stream from it, and gives the time at which it said that it drains.
    fn see_it_drain(&self, pod: &Pod, begun: &AtomicUsize) -> Result<Instant> {
        wait(PATIENCE, "all clients stream", || Ok((begun.load(Ordering::Relaxed) >= STREAMS).then_some(())))?;
        self.kubectl(&["delete", "pod", &pod.name, "--wait=false"])?;
        let deleted = Instant::now();
        wait(PATIENCE, "the pod says that it drains", || {
            Ok((http::get(&pod.address(), "/status")?.json()?["state"] == "draining").then_some(()))
        })?;
        say(&format!("e2e: the deleted pod drains after {:.1} s", deleted.elapsed().as_secs_f64()));
        Ok(Instant::now())
    }

    /// `ip:port` of the Service that the model's status names.
    fn service(&self) -> Result<String> {
        let url = self.kubectl(&["get", "dm", "tiny", "-o", "jsonpath={.status.url}"])?;
        ensure!(url == format!("http://tiny.{}.svc:8000", self.namespace.name()), "{url}");
        let ip = self.kubectl(&["get", "service", "tiny", "-o", "jsonpath={.spec.clusterIP}"])?;
        Ok(format!("{ip}:8000"))
    }

    fn pods(&self, selector: &str) -> Result<Vec<Pod>> {
        pods_of(&serde_json::from_str(&self.kubectl(&["get", "pods", "-l", selector, "-o", "json"])?)?)
    }

    /// The one pod of a role.
    fn pod(&self, selector: &str) -> Result<Pod> {
        let mut pods = self.pods(selector)?;
        ensure!(pods.len() == 1, "one pod with {selector}: {pods:?}");
        Ok(pods.remove(0))
    }

    /// Every object of the cluster: kind, namespace and name.
    fn inventory(&self) -> Result<BTreeSet<String>> {
        let kinds = self.plane.kubectl(&["api-resources", "--verbs=list", "-o", "name"])?.ok()?;
        let kinds: Vec<&str> = kinds.lines().filter(|kind| *kind != "componentstatuses").collect();
        let columns = "custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name";
        let list = self.plane.kubectl(&["get", &kinds.join(","), "-A", "--no-headers", "-o", columns])?.ok()?;
        let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let is_ours = |line: &String| !ITS_OWN.iter().any(|kind| line.starts_with(&format!("{kind} ")));
        Ok(list.lines().map(line).filter(is_ours).collect())
    }

    fn wait_inventory(&self, expected: &BTreeSet<String>) -> Result<()> {
        wait(PATIENCE, "what is left is what was there before", || {
            let now = self.inventory()?;
            let more: Vec<_> = now.difference(expected).collect();
            let less: Vec<_> = expected.difference(&now).collect();
            ensure!(more.is_empty() && less.is_empty(), "too many: {more:?}, missing: {less:?}");
            Ok(Some(()))
        })
    }

    /// For a failing test: what one looks at when something does not come up.
    fn diagnosis(&self) -> String {
        let shown = |arguments: &[&str]| match self.plane.kubectl(arguments) {
            Ok(ran) => format!("== kubectl {}\n{}{}\n", arguments.join(" "), ran.stdout, ran.stderr),
            Err(error) => format!("== kubectl {}: {error:#}\n", arguments.join(" ")),
        };
        let namespace = self.namespace.name();
        [
            shown(&["get", "all,dm", "-A", "-o", "wide"]),
            shown(&["get", "dm", "-A", "-o", "jsonpath={.items[*].status}"]),
            shown(&["describe", "pods", "-A"]),
            shown(&["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            shown(&["logs", "-n", SYSTEM, "-l", "app.kubernetes.io/part-of=baton", "--tail=30"]),
            shown(&["logs", "-n", namespace, "-l", DECODES, "--all-containers", "--prefix", "--tail=30"]),
            shown(&["logs", "-n", namespace, "-l", PREFILLS, "--all-containers", "--prefix", "--tail=30"]),
            self.plane.logs(),
        ]
        .concat()
    }
}

/// A pod as far as it matters which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pod {
    name: String,
    uid: String,
    ip: String,
    restarts: u64,
}

impl Pod {
    fn of(pod: &Value) -> Result<Self> {
        let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let statuses = ["initContainerStatuses", "containerStatuses"].map(|list| &pod["status"][list]);
        let each = statuses.iter().filter_map(|list| list.as_array()).flatten();
        Ok(Pod {
            name: text("/metadata/name"),
            uid: text("/metadata/uid"),
            ip: text("/status/podIP"),
            restarts: each.filter_map(|status| status["restartCount"].as_u64()).sum(),
        })
    }

    /// Where its proxy is reached.
    fn address(&self) -> String {
        format!("{}:8000", self.ip)
    }
}

fn pods_of(list: &Value) -> Result<Vec<Pod>> {
    list["items"].as_array().context("a list has items")?.iter().map(Pod::of).collect()
}

/// A chat completion that was streamed to its end.
#[derive(Debug)]
struct Chat {
    path: String,
    prefill_worker: String,
    decode_worker: String,
    pieces: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Chat {
    /// Asks, and reads all of the answer.
    fn stream(address: &str, id: &str, max_tokens: u32) -> Result<Self> {
        Self::read(id, Self::ask(address, id, max_tokens)?)
    }

    fn ask(address: &str, id: &str, max_tokens: u32) -> Result<http::Answer> {
        // A prompt of several pieces of prefill and many blocks of KV.
        let tale =
            "Once upon a time, a small fox lived near a quiet river. One day the fox wanted to cross the old bridge. ";
        let body = json!({
            "model": "tiny",
            "messages": [{ "role": "user", "content": tale.repeat(6) }],
            "max_tokens": max_tokens,
            "ignore_eos": true,
            "temperature": 0.8,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        http::send("POST", address, CHAT, &[("x-request-id", id)], body.to_string())
    }

    fn read(id: &str, mut answer: http::Answer) -> Result<Self> {
        if answer.status != 200 {
            let status = answer.status;
            bail!("{id} is answered {status}: {}", answer.text()?);
        }
        let header = |name: &str| answer.header(name).unwrap_or_default().to_owned();
        let [path, prefill_worker, decode_worker] =
            ["x-baton-path", "x-baton-prefill-worker", "x-baton-decode-worker"].map(header);
        let (mut pieces, mut bytes) = (0, Vec::new());
        while let Some(piece) = answer.chunk()? {
            pieces += 1;
            bytes.extend(piece);
        }
        let text = String::from_utf8(bytes)?;
        ensure!(text.trim_end().ends_with("data: [DONE]"), "{id} was cut off after {} bytes", text.len());
        let (mut content, mut usage) = (String::new(), Value::Null);
        for data in text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
            let mut event: Value = serde_json::from_str(data)?;
            ensure!(event.get("error").is_none(), "{id}: {event}");
            content += event.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default();
            if event["usage"].is_object() {
                usage = event["usage"].take();
            }
        }
        ensure!(!content.is_empty(), "{id}: no text came");
        let count = |name: &str| usage[name].as_u64().with_context(|| format!("{id}: no {name} in {usage}"));
        let prompt_tokens = usize::try_from(count("prompt_tokens")?)?;
        let completion_tokens = usize::try_from(count("completion_tokens")?)?;
        Ok(Chat { path, prefill_worker, decode_worker, pieces, prompt_tokens, completion_tokens })
    }

    fn is_handed_over(&self, prefill: &Pod, decode: &Pod) -> Result<()> {
        ensure!(self.path == "remote-prefill", "{self:?}");
        ensure!(self.prefill_worker == prefill.address() && self.decode_worker == decode.address(), "{self:?}");
        ensure!(prefill.ip != decode.ip, "two pods have one address");
        Ok(())
    }
}

fn parsed(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok()
}

/// The line of a log whose message begins so, and that fits.
fn line_of(log: &str, message: &str, fits: impl Fn(&Value) -> bool) -> Option<Value> {
    let is_it = |line: &Value| line["fields"]["message"].as_str().is_some_and(|said| said.starts_with(message));
    log.lines().filter_map(parsed).find(|line| is_it(line) && fits(line))
}

/// Times of one form in one time zone compare as texts.
fn time_of(line: &Value) -> Option<String> {
    line["timestamp"].as_str().map(str::to_owned)
}

/// How engine and proxy of a pod ended, once both have.
fn ends(pod: &Value) -> Option<[Value; 2]> {
    let ended = |list: &str, name: &str| {
        let status = pod["status"][list].as_array()?.iter().find(|status| status["name"] == name)?;
        Some(status["state"]["terminated"].clone()).filter(Value::is_object)
    };
    Some([ended("containerStatuses", "engine")?, ended("initContainerStatuses", "routing-proxy")?])
}

fn volume(namespace: &str, path: &Path) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": { "name": format!("models-{namespace}") },
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": { "storage": "1Gi" },
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": { "path": path, "type": "Directory" },
            "claimRef": { "namespace": namespace, "name": "models" },
        },
    })
}

fn claim() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": { "name": "models" },
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "resources": { "requests": { "storage": "1Gi" } },
        },
    })
}
