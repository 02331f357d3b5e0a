//! The admin port of a download: how far it is, and that it lives.

use super::progress::Tracker;
use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use baton_wire::names::paths;
use baton_wire::progress::Progress;
use tokio::net::TcpListener;

/// Serves until its caller ends it.
pub(super) async fn serve(listener: TcpListener, tracker: Tracker) {
    let router = Router::new()
        .route(paths::PROGRESS, get(progress))
        .route(paths::HEALTH, get(async || "ok\n"))
        .with_state(tracker);
    if let Err(error) = axum::serve(listener, router).await {
        // The download does not need it.
        tracing::warn!("progress is not told any more: {error}");
    }
}

async fn progress(State(tracker): State<Tracker>) -> Json<Progress> {
    Json(tracker.now())
}
