//! The rules of the router's side, each with its sentence: what is broken when the ledger shows a violation.

/// A rule of the router's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rule {
    PrefillStreams,
    PrefillStreamOptions,
    PrefillUncapped,
    PrefillMinTokens,
    PrefillChoices,
    HandoverFlags,
    HandoverUnreadable,
    WrongRole,
    HandleIncomplete,
    HandleAltered,
    HandleUnknown,
    HandleFreed,
    RequestIdsDiffer,
    RequestIdTwice,
    SteeringHeader,
    DuplicateKey,
    BootstrapMissing,
    BootstrapShape,
    BootstrapPort,
    RoomOutOfRange,
    DuplicateRoom,
    LegsDiffer,
    LegUnreadable,
    TransferMissing,
    ForeignToken,
    RankOutOfRange,
    RoomOffRank,
    PrefillRankDiffers,
}

impl Rule {
    /// Every rule, in the order in which the manual explains them.
    pub(crate) const ALL: [Rule; 28] = [
        Rule::PrefillStreams,
        Rule::PrefillStreamOptions,
        Rule::PrefillUncapped,
        Rule::PrefillMinTokens,
        Rule::PrefillChoices,
        Rule::HandoverFlags,
        Rule::HandoverUnreadable,
        Rule::WrongRole,
        Rule::HandleIncomplete,
        Rule::HandleAltered,
        Rule::HandleUnknown,
        Rule::HandleFreed,
        Rule::RequestIdsDiffer,
        Rule::RequestIdTwice,
        Rule::SteeringHeader,
        Rule::DuplicateKey,
        Rule::BootstrapMissing,
        Rule::BootstrapShape,
        Rule::BootstrapPort,
        Rule::RoomOutOfRange,
        Rule::DuplicateRoom,
        Rule::LegsDiffer,
        Rule::LegUnreadable,
        Rule::TransferMissing,
        Rule::ForeignToken,
        Rule::RankOutOfRange,
        Rule::RoomOffRank,
        Rule::PrefillRankDiffers,
    ];

    /// As the ledger spells it.
    pub(crate) const fn as_str(self) -> &'static str {
        self.told().0
    }

    /// What is wrong, and what follows from it.
    pub(crate) const fn sentence(self) -> &'static str {
        self.told().1
    }

    const fn told(self) -> (&'static str, &'static str) {
        match self {
            Rule::PrefillStreams => (
                "prefill-streams",
                "a prefill leg must have stream=false: a streamed answer carries no handle, and the KV waits out its lease",
            ),
            Rule::PrefillStreamOptions => (
                "prefill-stream-options",
                "a prefill leg must not have stream_options: vLLM refuses them where stream is false",
            ),
            Rule::PrefillUncapped => (
                "prefill-uncapped",
                "a prefill leg must be capped to 1 token by every limit that its API knows and the client sent: the prefill \
                 engine decodes the whole answer otherwise",
            ),
            Rule::PrefillMinTokens => (
                "prefill-min-tokens",
                "a prefill leg must not have min_tokens above 1: vLLM refuses min_tokens above max_tokens",
            ),
            Rule::PrefillChoices => {
                ("prefill-choices", "a prefill leg must have n=1: the handle is for one sequence, and for one pull")
            }
            Rule::HandoverFlags => (
                "handover-flags",
                "do_remote_prefill and do_remote_decode must not both be true in one leg: it either gives KV or takes it",
            ),
            Rule::HandoverUnreadable => {
                ("handover-unreadable", "kv_transfer_params must be an object with fields of the known types")
            }
            Rule::WrongRole => ("wrong-role", "this leg was sent to an engine of the other role"),
            Rule::HandleIncomplete => (
                "handle-incomplete",
                "a decode leg must have remote_block_ids, remote_engine_id, remote_host and remote_port: vLLM silently \
                 computes the prompt again where one is missing",
            ),
            Rule::HandleAltered => (
                "handle-altered",
                "the handle is opaque: it must reach decode with every field and value that prefill gave it",
            ),
            Rule::HandleUnknown => ("handle-unknown", "a decode leg wants KV that this prefill engine never held"),
            Rule::HandleFreed => (
                "handle-freed",
                "a decode leg wants KV that was already taken, released or given up when its lease ended",
            ),
            Rule::RequestIdsDiffer => (
                "request-ids-differ",
                "both legs must have the same x-request-id: the engines' logs can't be joined otherwise",
            ),
            Rule::RequestIdTwice => ("request-id-twice", "a leg must have one x-request-id"),
            Rule::SteeringHeader => {
                ("steering-header", "headers that choose workers are for the router and must not reach an engine")
            }
            Rule::DuplicateKey => {
                ("duplicate-key", "a key must not stand twice in a body: engines differ in which of the two they take")
            }
            Rule::BootstrapMissing => (
                "bootstrap-missing",
                "both legs must have bootstrap_host, bootstrap_port and bootstrap_room where an engine serves one role",
            ),
            Rule::BootstrapShape => (
                "bootstrap-shape",
                "the three bootstrap fields must be arrays as long as the batch, and no arrays where there is no batch",
            ),
            Rule::BootstrapPort => {
                ("bootstrap-port", "bootstrap_port must be the one of the prefill engine that receives the leg")
            }
            Rule::RoomOutOfRange => ("room-out-of-range", "a bootstrap_room must be a whole number from 0 to 2^63-1"),
            Rule::DuplicateRoom => (
                "duplicate-room",
                "a room must not be in use already: two requests of one room end both of SGLang's schedulers",
            ),
            Rule::LegsDiffer => ("legs-differ", "both legs must have the same prompt"),
            Rule::LegUnreadable => ("leg-unreadable", "a leg must be what worker and proxy agreed on"),
            Rule::TransferMissing => (
                "transfer-missing",
                "a prefill leg must have one transfer for each prompt, and a decode leg as many or none",
            ),
            Rule::ForeignToken => (
                "foreign-token",
                "a transfer's token must be of that transfer and attempt, for the decode worker that receives it",
            ),
            Rule::RankOutOfRange => {
                ("rank-out-of-range", "a data-parallel rank that a leg names must be one that this engine has")
            }
            Rule::RoomOffRank => (
                "room-off-rank",
                "a bootstrap_room modulo the prefill engine's ranks must be the rank that its leg names: engines that follow the \
                 room would compute the prompt elsewhere",
            ),
            Rule::PrefillRankDiffers => (
                "prefill-rank-differs",
                "a decode leg must say in disagg_prefill_dp_rank which rank has its prompt, unless the room says it: it waits for \
                 KV at another rank otherwise",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_a_name_of_its_own() {
        let mut names = Rule::ALL.map(Rule::as_str);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
