//! Conditions of a model's status and the closed list of their reasons, each with what it means and what to do about it.
//!
//! The words here are the ones of docs/conditions.md, which `crdgen` writes from them.

/// A condition of `status.conditions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// The manifest is one that can be acted on.
    Accepted,
    /// The weights are where the engines read them.
    ModelAvailable,
    /// Prefill.
    PrefillReady,
    /// Decode.
    DecodeReady,
    /// Clients' requests have a way in.
    RoutingReady,
    /// A KV cache was handed over and used.
    KvTransferReady,
    /// Something is still under way.
    Progressing,
    /// The model serves.
    Ready,
    /// Nothing happens until a person acts.
    Stalled,
}

impl ConditionType {
    /// All of them, in the order in which they are written.
    pub const ALL: [ConditionType; 9] = [
        ConditionType::Accepted,
        ConditionType::ModelAvailable,
        ConditionType::PrefillReady,
        ConditionType::DecodeReady,
        ConditionType::RoutingReady,
        ConditionType::KvTransferReady,
        ConditionType::Progressing,
        ConditionType::Ready,
        ConditionType::Stalled,
    ];

    /// The condition's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            ConditionType::Accepted => "Accepted",
            ConditionType::ModelAvailable => "ModelAvailable",
            ConditionType::PrefillReady => "PrefillReady",
            ConditionType::DecodeReady => "DecodeReady",
            ConditionType::RoutingReady => "RoutingReady",
            ConditionType::KvTransferReady => "KVTransferReady",
            ConditionType::Progressing => "Progressing",
            ConditionType::Ready => "Ready",
            ConditionType::Stalled => "Stalled",
        }
    }

    /// What it says when it is True.
    pub fn meaning(self) -> &'static str {
        match self {
            ConditionType::Accepted => {
                "The manifest can be acted on, and the API server took every object made from it."
            }
            ConditionType::ModelAvailable => "The model directory is where the engines read it.",
            ConditionType::PrefillReady => "As many prefill replicas as are wanted take work, or none is needed.",
            ConditionType::DecodeReady => "As many decode replicas as are wanted take work.",
            ConditionType::RoutingReady => {
                "A request that reaches `status.url` finds a routing proxy that knows a decode worker and, where prompts are handed over, a prefill worker of the same revision."
            }
            ConditionType::KvTransferReady => {
                "A KV cache went from a prefill worker to a decode worker and was used there."
            }
            ConditionType::Progressing => "The cluster is still on its way to what the manifest says.",
            ConditionType::Ready => "The model serves as the manifest says.",
            ConditionType::Stalled => "Nothing more happens until a person acts.",
        }
    }

    /// From what it is computed, which is also where to look when it is not True.
    pub fn owner(self) -> &'static str {
        match self {
            ConditionType::Accepted => {
                "The operator's validation of the manifest, its discovery of optional APIs, and the API server's answers to its writes."
            }
            ConditionType::ModelAvailable => {
                "The model's volume and Secret, the `model-download` container, and engines that have loaded it."
            }
            ConditionType::PrefillReady => "The workload and the pods of role `prefill`.",
            ConditionType::DecodeReady => "The workload and the pods of role `decode`.",
            ConditionType::RoutingReady => {
                "The client Service's endpoints; with `routing.mode: Standalone` the pods of the front door."
            }
            ConditionType::KvTransferReady => {
                "Nobody yet: it is absent, and Ready does not read it, until workers report a real handover."
            }
            ConditionType::Progressing => "The workloads of every revision against the wanted one.",
            ConditionType::Ready => "Accepted, ModelAvailable, PrefillReady, DecodeReady and RoutingReady together.",
            ConditionType::Stalled => "The reasons in the list below that say so; absent otherwise.",
        }
    }
}

/// Why a condition is what it is. Closed: a new reason is a new variant here, with its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    // The manifest and its children.
    /// Nothing is wrong with it.
    Accepted,
    /// It breaks a rule.
    InvalidSpec,
    /// It asks for an API that the cluster lacks.
    CrdNotInstalled,
    /// The API server took a child not.
    ChildRefused,
    /// A child's name is somebody else's.
    NameTaken,
    /// The operator can't read or write what it should.
    ClusterUnreadable,
    /// The object is being deleted.
    Deleting,

    // A role's pods.
    /// All are ready.
    AllReplicasReady,
    /// There is nothing for the role to do.
    NotNeeded,
    /// An autoscaler wants none.
    ScaledToZero,
    /// No pod has started yet.
    WaitingForPods,
    /// The engine loads.
    EngineStarting,
    /// No node has room.
    InsufficientCapacity,
    /// The namespace's quota is used up.
    QuotaExceeded,
    /// Admission takes no such pod.
    PodsRefused,
    /// An image can't be had.
    ImagePullFailed,
    /// A Secret, ConfigMap or ServiceAccount is missing.
    ConfigurationMissing,
    /// A claim is missing or unbound.
    VolumeMissing,
    /// The engine keeps ending.
    EngineCrashLooping,
    /// The routing proxy keeps ending.
    ProxyCrashLooping,
    /// A pod that was ready is not any more.
    PodsNotReady,
    /// A pod's node does not answer.
    NodeLost,

    // The model.
    /// It is there.
    ModelAvailable,
    /// It is on its way.
    ModelDownloading,
    /// It could not be fetched.
    ModelDownloadFailed,
    /// The Secret for it is missing.
    CredentialsMissing,

    // Routing.
    /// Requests find their workers.
    RoutingReady,
    /// No prefill and decode worker of one revision are ready at once.
    WaitingForPair,

    // Progress and the whole.
    /// The first objects are being made.
    Creating,
    /// One revision takes another's place.
    RolloutInProgress,
    /// Replicas come or go.
    Scaling,
    /// Nothing is under way.
    Settled,
    /// Everything is ready.
    AllRolesReady,
}

impl Reason {
    /// All of them, in the order of the document.
    pub const ALL: [Reason; 33] = [
        Reason::Accepted,
        Reason::InvalidSpec,
        Reason::CrdNotInstalled,
        Reason::ChildRefused,
        Reason::NameTaken,
        Reason::ClusterUnreadable,
        Reason::Deleting,
        Reason::AllReplicasReady,
        Reason::NotNeeded,
        Reason::ScaledToZero,
        Reason::WaitingForPods,
        Reason::EngineStarting,
        Reason::InsufficientCapacity,
        Reason::QuotaExceeded,
        Reason::PodsRefused,
        Reason::ImagePullFailed,
        Reason::ConfigurationMissing,
        Reason::VolumeMissing,
        Reason::EngineCrashLooping,
        Reason::ProxyCrashLooping,
        Reason::PodsNotReady,
        Reason::NodeLost,
        Reason::ModelAvailable,
        Reason::ModelDownloading,
        Reason::ModelDownloadFailed,
        Reason::CredentialsMissing,
        Reason::RoutingReady,
        Reason::WaitingForPair,
        Reason::Creating,
        Reason::RolloutInProgress,
        Reason::Scaling,
        Reason::Settled,
        Reason::AllRolesReady,
    ];

    /// The condition's `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Accepted => "Accepted",
            Reason::InvalidSpec => "InvalidSpec",
            Reason::CrdNotInstalled => "CRDNotInstalled",
            Reason::ChildRefused => "ChildRefused",
            Reason::NameTaken => "NameTaken",
            Reason::ClusterUnreadable => "ClusterUnreadable",
            Reason::Deleting => "Deleting",
            Reason::AllReplicasReady => "AllReplicasReady",
            Reason::NotNeeded => "NotNeeded",
            Reason::ScaledToZero => "ScaledToZero",
            Reason::WaitingForPods => "WaitingForPods",
            Reason::EngineStarting => "EngineStarting",
            Reason::InsufficientCapacity => "InsufficientCapacity",
            Reason::QuotaExceeded => "QuotaExceeded",
            Reason::PodsRefused => "PodsRefused",
            Reason::ImagePullFailed => "ImagePullFailed",
            Reason::ConfigurationMissing => "ConfigurationMissing",
            Reason::VolumeMissing => "VolumeMissing",
            Reason::EngineCrashLooping => "EngineCrashLooping",
            Reason::ProxyCrashLooping => "ProxyCrashLooping",
            Reason::PodsNotReady => "PodsNotReady",
            Reason::NodeLost => "NodeLost",
            Reason::ModelAvailable => "ModelAvailable",
            Reason::ModelDownloading => "ModelDownloading",
            Reason::ModelDownloadFailed => "ModelDownloadFailed",
            Reason::CredentialsMissing => "CredentialsMissing",
            Reason::RoutingReady => "RoutingReady",
            Reason::WaitingForPair => "WaitingForPair",
            Reason::Creating => "Creating",
            Reason::RolloutInProgress => "RolloutInProgress",
            Reason::Scaling => "Scaling",
            Reason::Settled => "Settled",
            Reason::AllRolesReady => "AllRolesReady",
        }
    }

    /// What is the case.
    pub fn meaning(self) -> &'static str {
        match self {
            Reason::Accepted => "The manifest is right, and so are the objects made from it.",
            Reason::InvalidSpec => {
                "The manifest breaks a rule that the API server did not check: in volumes or podTemplate, or stored under an older definition."
            }
            Reason::CrdNotInstalled => {
                "The manifest asks for something whose API the cluster does not have, such as LeaderWorkerSet or PodMonitor."
            }
            Reason::ChildRefused => {
                "The API server refused an object that the operator makes for the model: as invalid, by a webhook or policy, or for want of rights."
            }
            Reason::NameTaken => {
                "An object that somebody else made has the name of one that the model needs. The operator never takes over what is not its own."
            }
            Reason::ClusterUnreadable => {
                "The operator could not read what it needs from the API server, or write what it should, and tries again."
            }
            Reason::Deleting => "The DisaggregatedModel is being deleted, and what was made for it goes with it.",
            Reason::AllReplicasReady => "As many replicas as are wanted take work.",
            Reason::NotNeeded => "With policy Never no prefill worker runs: decode workers serve both phases.",
            Reason::ScaledToZero => "What owns the role's replicas has set them to 0.",
            Reason::WaitingForPods => "Pods of the role are still to be created, scheduled or started.",
            Reason::EngineStarting => "The engine runs and loads the model; it does not take work yet.",
            Reason::InsufficientCapacity => {
                "No node fits a pod: too few GPUs, CPUs or memory, or no node has the labels asked for."
            }
            Reason::QuotaExceeded => "The namespace's ResourceQuota leaves no room for a pod or another object.",
            Reason::PodsRefused => {
                "The API server refuses the role's pods: Pod Security, a webhook, a LimitRange or an unknown class."
            }
            Reason::ImagePullFailed => "An image does not exist, or the node may not or can not pull it.",
            Reason::ConfigurationMissing => {
                "A Secret, ConfigMap or ServiceAccount that a pod needs, or a key in it, does not exist."
            }
            Reason::VolumeMissing => {
                "A PersistentVolumeClaim that a pod needs does not exist, is not bound, or can't be mounted."
            }
            Reason::EngineCrashLooping => "The engine ends again and again soon after its start.",
            Reason::ProxyCrashLooping => "The routing proxy ends again and again soon after its start.",
            Reason::PodsNotReady => "A pod runs but does not take work: it has stopped answering, or is draining.",
            Reason::NodeLost => "The node of a pod no longer answers; what runs there is unknown.",
            Reason::ModelAvailable => "The engines have the model directory.",
            Reason::ModelDownloading => "The model is being downloaded; `status.download` has the progress.",
            Reason::ModelDownloadFailed => "The download ended with an error and is tried again.",
            Reason::CredentialsMissing => "The Secret of `spec.model.credentialsSecretRef` does not exist.",
            Reason::RoutingReady => "Requests that reach `status.url` find their workers.",
            Reason::WaitingForPair => {
                "There is no revision of which every role that it needs has a ready worker, so no request can be served as planned."
            }
            Reason::Creating => "The model's first objects are being made.",
            Reason::RolloutInProgress => "Pods of a new revision come up, or those of an old one go.",
            Reason::Scaling => "The number of replicas is on its way to the wanted one.",
            Reason::Settled => "Everything is as the manifest says; nothing is under way.",
            Reason::AllRolesReady => "Model, roles and routing are ready.",
        }
    }

    /// What a person does about it; nothing, where all is well or goes its way.
    pub fn cure(self) -> Option<&'static str> {
        match self {
            Reason::Accepted
            | Reason::AllReplicasReady
            | Reason::NotNeeded
            | Reason::ModelAvailable
            | Reason::RoutingReady
            | Reason::Settled
            | Reason::AllRolesReady => None,
            Reason::InvalidSpec => Some(
                "Correct the field that the message names; `baton check -f FILE` shows every mistake at once. What runs is left as it is until then.",
            ),
            Reason::CrdNotInstalled => Some(
                "Install the API that the message names, or take the field back that asks for it. The operator notices by itself.",
            ),
            Reason::ChildRefused => Some(
                "The message has the object and the API server's own words: change the policy, the rights of the operator, or the field that led there.",
            ),
            Reason::NameTaken => {
                Some("Rename or delete the object that the message names, or give the model another name.")
            }
            Reason::ClusterUnreadable => Some(
                "The message has the API server's answer: see whether it is reachable, and whether the operator's ServiceAccount has its rights.",
            ),
            Reason::Deleting => Some("Wait. If it lasts, see which finalizers its children have."),
            Reason::ScaledToZero => {
                Some("Look at the autoscaler, or set the workload's replicas with `kubectl scale`.")
            }
            Reason::WaitingForPods => {
                Some("Wait. If it lasts, see `kubectl describe` of the workload and of its pods.")
            }
            Reason::EngineStarting => {
                Some("Wait: large models take minutes to load. `baton status`, or the pod's log, shows the progress.")
            }
            Reason::InsufficientCapacity => Some(
                "The message has the scheduler's words: add nodes, or ask for less in resources, gpu, nodeSelector, tolerations, topologySpread or spec.placement.",
            ),
            Reason::QuotaExceeded => Some("Raise the ResourceQuota, or ask for fewer replicas or resources."),
            Reason::PodsRefused => Some(
                "The message has the API server's words: change the podTemplate, the class that is named there, or the namespace's policy.",
            ),
            Reason::ImagePullFailed => Some(
                "Check the image's name in spec.engine.image (or of the operator's installation), and that nodes have the right to pull it.",
            ),
            Reason::ConfigurationMissing => Some("Create what the message names, or correct the reference to it."),
            Reason::VolumeMissing => Some(
                "Create the claim that the message names, see why it is not bound (`kubectl describe pvc`), or correct spec.model.uri or spec.model.cache.",
            ),
            Reason::EngineCrashLooping => Some(
                "`status.lastErrors` has its last words, which name the cause and the cure. Killed for memory (`OOMKilled`): raise the role's memory limit, or lower kvCacheMemory.",
            ),
            Reason::ProxyCrashLooping => {
                Some("`status.lastErrors` has its last words. The proxy's image and the operator's are of one version.")
            }
            Reason::PodsNotReady => Some("See the pod's log and `baton status`. A pod that drains ends by itself."),
            Reason::NodeLost => Some("Bring the node back, or delete it: Kubernetes then replaces its pods."),
            Reason::ModelDownloading => {
                Some("Wait. Where the percentage stands still, see the log of container `model-download`.")
            }
            Reason::ModelDownloadFailed => Some(
                "`status.lastErrors` has the cause: a wrong name or revision, missing rights, no way to the source, or a full cache volume.",
            ),
            Reason::CredentialsMissing => Some(
                "Create the Secret in the model's namespace: key HF_TOKEN for hf://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, a pull secret for oci://.",
            ),
            Reason::WaitingForPair => Some("Look at the role that is not ready: PrefillReady and DecodeReady say why."),
            Reason::Creating | Reason::RolloutInProgress | Reason::Scaling => {
                Some("Wait. What holds it up is in PrefillReady and DecodeReady.")
            }
        }
    }

    /// Whether nothing more happens until a person acts, so that the condition Stalled goes with it. What may arrive later by itself
    /// (a Secret, a volume, a node, a registry) does not stall.
    pub fn stalls(self) -> bool {
        matches!(self, Reason::InvalidSpec | Reason::CrdNotInstalled | Reason::ChildRefused | Reason::NameTaken)
    }
}

impl std::fmt::Display for ConditionType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// docs/conditions.md.
pub fn document() -> String {
    let mut text = String::from(
        "<!-- Generated from crds/src/condition.rs by `make generate`; edit the words there instead. -->\n\
         # Conditions and their reasons\n\n\
         `kubectl get dm NAME -o yaml` shows them under `status.conditions`, `kubectl describe dm NAME` with the events beside them.\n\
         `kubectl wait --for=condition=Ready dm/NAME` waits for the model; `Stalled` is there only while nothing more happens until a\n\
         person acts, so that kstatus, Flux and Argo CD tell a failure from a start. Each condition carries the generation of the\n\
         manifest that it is about. The list of reasons is closed: a reason that is not here does not occur.\n\n\
         ## Conditions\n\n| condition | True means | computed from |\n|---|---|---|\n",
    );
    for condition in ConditionType::ALL {
        text.push_str(&format!("| `{condition}` | {} | {} |\n", condition.meaning(), condition.owner()));
    }
    text.push_str("\n## Reasons\n\n| reason | what is the case | what to do | stalls |\n|---|---|---|---|\n");
    for reason in Reason::ALL {
        let cure = reason.cure().unwrap_or("Nothing.");
        let stalls = if reason.stalls() { "yes" } else { "" };
        text.push_str(&format!("| `{reason}` | {} | {cure} | {stalls} |\n", reason.meaning()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_committed_document_says_what_the_types_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conditions.md");
        let committed = std::fs::read_to_string(path).expect("the document is committed");
        assert!(committed == document(), "{path} is stale: run `make generate`");
    }

    #[test]
    fn every_reason_is_listed_once_in_camel_case_with_its_words() {
        let words: BTreeSet<&str> = Reason::ALL.into_iter().map(Reason::as_str).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert!(reason.as_str().chars().all(|c| c.is_ascii_alphanumeric()), "{reason}");
            assert!(reason.as_str().starts_with(|c: char| c.is_ascii_uppercase()), "{reason}");
            assert!(reason.meaning().ends_with('.') && !reason.meaning().contains('|'), "{reason}");
            assert!(reason.cure().is_none_or(|cure| cure.ends_with('.') && !cure.contains('|')), "{reason}");
            assert!(!reason.stalls() || reason.cure().is_some(), "{reason} stalls without a cure");
        }
        let types: BTreeSet<&str> = ConditionType::ALL.into_iter().map(ConditionType::as_str).collect();
        assert_eq!(types.len(), ConditionType::ALL.len());
    }
}
