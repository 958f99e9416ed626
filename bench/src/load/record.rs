//! `load.json`.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::load::import::Imported;
use crate::load::metrics::{Metrics, Trim};
use crate::load::openai::Endpoint;
use crate::load::saturation::Alarm;
use crate::load::trace::RequestTrace;
use crate::slo::search::FindMax;
use crate::slo::verdict::SloVerdict;

/// Version of the format.
pub const SCHEMA: u32 = 1;

/// Where requests went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetRecord {
    /// Address.
    pub url: String,
    /// Endpoint.
    pub endpoint: Endpoint,
    /// Model name in the requests.
    pub model: String,
    /// Answers streamed.
    pub streaming: bool,
    /// Answers made exactly as long as asked.
    pub exact_output: bool,
    /// `Server` header of `/v1/models`.
    pub server: Option<String>,
}

/// Whether the client, not the server, set the pace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientCheck {
    /// 99th percentile of start of sending − scheduled start, ms (of all requests; the greatest where there are few).
    pub schedule_delay_p99_ms: f64,
    /// Greatest.
    pub schedule_delay_max_ms: f64,
    /// CPU time of the client's thread, as a share of the wall time.
    pub cpu_frac: Option<f64>,
    /// Connections opened.
    pub connections: u64,
    /// Requests sent again because the server had closed an idle connection.
    pub resent: u64,
    /// Why the stage says nothing about the server; empty when it does.
    pub invalid: Vec<String>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// `synchronous`, `concurrent`, `throughput`, `constant`, `poisson`, `gamma`, `replay`.
    pub profile: String,
    /// Requests a second asked for.
    pub rate: Option<f64>,
    /// Streams of a closed loop.
    pub streams: Option<usize>,
    /// Seconds from the first scheduled request to the end of everything.
    pub seconds: f64,
    /// Why it ended.
    pub stopped_by: String,
    /// Refusals (429) of a closed loop that were waited out as `Retry-After` says; those requests are counted once, as they ended.
    #[serde(default)]
    pub rejected: u64,
    /// The server fell behind.
    pub saturation: Option<Alarm>,
    /// The client's own behaviour.
    pub client: ClientCheck,
    /// Results.
    pub metrics: Metrics,
    /// Against the objective.
    pub slo: Option<SloVerdict>,
    /// Raw samples, one a request, in the order of ending.
    pub requests: Vec<RequestTrace>,
}

/// `load.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Server.
    pub target: TargetRecord,
    /// Data.
    pub data: String,
    /// What is left out of every stage.
    pub trim: Trim,
    /// Stages in order.
    pub stages: Vec<StageRecord>,
    /// The highest rate that meets the objective, where it was searched.
    pub find_max: Option<FindMax>,
    /// Measured by another tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Imported>,
}

impl LoadRecord {
    /// Stages that say something about the server.
    pub fn valid(&self) -> impl Iterator<Item = &StageRecord> {
        self.stages.iter().filter(|s| s.client.invalid.is_empty())
    }
}
