//! How far downloads are, asked of the pods that download: their init container serves it while it runs.

use baton_wire::names::paths;
use baton_wire::progress::Progress;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::StatusCode;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The init container that downloads.
pub const CONTAINER: &str = "model-download";
/// Pods that are asked in one reconcile. Where more download, they fetch the same.
const PODS_MAX: usize = 4;
/// How long a pod may take: the rest of the status must not wait for it.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Longest answer: the longest URI and error are of some kilobytes.
const BYTES_MAX: usize = 64 * 1024;

/// Asks pods.
#[derive(Clone, Debug)]
pub struct ProgressReader {
    client: Client<HttpConnector, Empty<Bytes>>,
    port: u16,
}

impl ProgressReader {
    /// Asks on that port.
    pub fn new(port: u16) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(TIMEOUT));
        ProgressReader {
            client: Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector),
            port,
        }
    }

    /// What those pods that download answer, by name. One that does not answer is left out: it may have ended just now.
    pub async fn read(&self, pods: &[Pod]) -> BTreeMap<String, Progress> {
        let asked = pods.iter().filter_map(downloading).take(PODS_MAX);
        let answers = asked.map(|(name, address)| async move { Some((name, self.ask(address).await?)) });
        futures_util::stream::iter(answers).buffer_unordered(PODS_MAX).filter_map(std::future::ready).collect().await
    }

    async fn ask(&self, address: IpAddr) -> Option<Progress> {
        let address = SocketAddr::new(address, self.port);
        let uri = format!("http://{address}{}", paths::PROGRESS).parse().ok()?;
        let asked = async {
            let answer = self.client.get(uri).await.ok()?;
            if answer.status() != StatusCode::OK {
                return None;
            }
            let body = Limited::new(answer.into_body(), BYTES_MAX).collect().await.ok()?;
            serde_json::from_slice(&body.to_bytes()).ok()
        };
        let answer = tokio::time::timeout(TIMEOUT, asked).await.ok().flatten();
        if answer.is_none() {
            tracing::debug!(%address, "no progress of a download");
        }
        answer
    }
}

/// A pod's name and address while its download runs.
pub fn downloading(pod: &Pod) -> Option<(String, IpAddr)> {
    let status = pod.status.as_ref()?;
    let containers = status.init_container_statuses.as_deref().unwrap_or_default();
    let runs = containers.iter().any(|container| {
        container.name == CONTAINER && container.state.as_ref().is_some_and(|state| state.running.is_some())
    });
    let address = status.pod_ip.as_deref()?.parse().ok()?;
    runs.then_some((pod.metadata.name.clone()?, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::progress::Phase;
    use serde_json::json;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn pod(name: &str, container: &str, state: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {
                "podIP": "127.0.0.1",
                "initContainerStatuses": [{"name": container, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {state: {}}}],
            },
        }))
        .expect("a pod")
    }

    async fn serve(answer: String) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        port
    }

    #[tokio::test]
    async fn pods_that_download_are_asked_and_no_others() {
        let progress = Progress {
            uri: "hf://org/repo".to_owned(),
            phase: Phase::Downloading,
            bytes_done: 5,
            bytes_total: 10,
            files_done: 0,
            files_total: 1,
            bytes_per_second: 1,
            error: None,
        };
        let port = serve(serde_json::to_string(&progress).expect("strings and numbers")).await;
        let pods =
            [pod("a", CONTAINER, "running"), pod("b", CONTAINER, "waiting"), pod("c", "routing-proxy", "running")];
        let answers = ProgressReader::new(port).read(&pods).await;
        assert_eq!(answers, [("a".to_owned(), progress)].into());
    }

    #[tokio::test]
    async fn a_pod_that_answers_nonsense_is_left_out() {
        let port = serve("x".repeat(BYTES_MAX + 1)).await;
        assert!(ProgressReader::new(port).read(&[pod("a", CONTAINER, "running")]).await.is_empty());
    }
}
