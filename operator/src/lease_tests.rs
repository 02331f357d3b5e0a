//! Elections: the decisions one by one, and two replicas on an API whose answers and processes are delayed at random.

use super::*;
use proptest::prelude::*;

const ME: &str = "operator-a";
const OTHER: &str = "operator-b";

fn at(seconds: u64) -> Duration {
    Duration::from_secs(1000 + seconds)
}

fn held_by(holder: &str, version: &str) -> Record {
    Record {
        holder: holder.to_owned(),
        duration: DURATION,
        transitions: 3,
        stamp: Some(Timestamp::UNIX_EPOCH),
        version: version.to_owned(),
    }
}

fn leader() -> Elector {
    let mut elector = Elector::new(ME);
    elector.observe(at(0), Some(held_by("", "1")));
    let mut written = elector.write(at(0), Timestamp::UNIX_EPOCH);
    written.version = "2".to_owned();
    elector.observe(at(0), Some(written));
    elector
}

#[test]
fn a_lease_that_nobody_holds_is_acquired() {
    let mut elector = Elector::new(ME);
    assert_eq!(elector.decide(at(0)), Decision::Acquire);
    elector.observe(at(0), Some(held_by("", "1")));
    assert_eq!(elector.decide(at(0)), Decision::Acquire);
    assert_eq!(elector.open_until(), None);
}

#[test]
fn anothers_lease_is_waited_for_from_when_it_was_first_seen_and_again_after_each_renewal() {
    let mut elector = Elector::new(ME);
    elector.observe(at(0), Some(held_by(OTHER, "1")));
    elector.observe(at(14), Some(held_by(OTHER, "1")));
    assert_eq!(elector.decide(at(14)), Decision::Wait);
    assert_eq!(elector.decide(at(15)), Decision::Acquire);
    elector.observe(at(14), Some(held_by(OTHER, "2")));
    assert_eq!(elector.decide(at(28)), Decision::Wait);
    assert_eq!(elector.decide(at(29)), Decision::Acquire);
}

#[test]
fn a_container_that_is_started_again_goes_on_with_its_pods_lease() {
    let mut elector = Elector::new(ME);
    elector.observe(at(0), Some(held_by(ME, "1")));
    assert_eq!(elector.decide(at(0)), Decision::Acquire);
    assert_eq!(elector.write(at(0), Timestamp::UNIX_EPOCH).transitions, 3);
}

#[test]
fn a_leader_renews_until_its_last_renewal_is_too_old() {
    let elector = leader();
    assert_eq!(elector.open_until(), Some(at(10)));
    assert_eq!(elector.decide(at(9)), Decision::Renew);
    assert_eq!(elector.decide(at(10)), Decision::Lost);
    assert_eq!(elector.decide(at(600)), Decision::Lost);
}

#[test]
fn a_leader_that_finds_anybody_elses_write_has_lost() {
    for (record, why) in [
        (Some(held_by(OTHER, "3")), "another holds it"),
        (Some(held_by(ME, "3")), "a twin wrote it in our name"),
        (None, "it was deleted"),
    ] {
        let mut elector = leader();
        elector.observe(at(1), record);
        assert_eq!(elector.decide(at(1)), Decision::Lost, "{why}");
    }
}

#[test]
fn a_renewal_whose_answer_was_lost_counts_from_when_it_was_sent() {
    let mut elector = leader();
    let stamp = Timestamp::from_second(77).expect("a time");
    let mut stored = elector.write(at(4), stamp);
    stored.version = "3".to_owned();
    elector.observe(at(8), Some(stored));
    assert_eq!(elector.open_until(), Some(at(14)));
}

#[test]
fn a_lease_that_is_let_go_names_nobody() {
    let released = leader().release().expect("it was held");
    assert_eq!((released.holder.as_str(), released.version.as_str()), ("", "2"));
    assert_eq!(Elector::new(ME).release(), None);
}

#[test]
fn a_lease_survives_its_form_in_the_cluster() {
    let record = Record { stamp: Some(micros(Timestamp::now())), ..held_by(ME, "8") };
    assert_eq!(super::record(lease("baton", &record)), record);
}

/// One write on its way to the API server or back.
#[derive(Clone, Debug)]
enum Message {
    Read,
    Write(Record),
    Answer(Option<Record>),
}

/// A replica on an own clock, with at most one message under way, as the loop has it.
struct Replica {
    elector: Elector,
    skew: Duration,
    asleep_until: Duration,
    open_until: Duration,
    message: Option<(Duration, Message)>,
    next_step: Duration,
    ended: bool,
}

impl Replica {
    fn clock(&self, now: Duration) -> Duration {
        now + self.skew
    }

    /// Whether a write of this replica would leave now, however stale its thoughts: the fence alone decides.
    fn is_open(&self, now: Duration) -> bool {
        self.clock(now) < self.open_until
    }
}

#[derive(Clone, Debug)]
struct Delay {
    to_server: u64,
    back: u64,
    freeze: u64,
    lost: bool,
}

fn delays() -> impl Strategy<Value = Vec<Delay>> {
    let delay = (0u64..4000, 0u64..4000, prop_oneof![8 => Just(0u64), 2 => 0u64..40_000], prop::bool::weighted(0.1));
    prop::collection::vec(
        delay.prop_map(|(to_server, back, freeze, lost)| Delay { to_server, back, freeze, lost }),
        20..80,
    )
}

proptest! {
    #[test]
    fn two_replicas_never_both_pass_the_gate(delays in delays(), skews in (0u64..1_000_000, 0u64..1_000_000)) {
        let mut stored: Option<Record> = None;
        let mut version = 0u32;
        let mut delays = delays.into_iter().cycle();
        let mut led = 0;
        let mut replicas = [(ME, skews.0), (OTHER, skews.1)].map(|(identity, skew)| Replica {
            elector: Elector::new(identity),
            skew: Duration::from_millis(1 + skew),
            asleep_until: Duration::ZERO,
            open_until: Duration::ZERO,
            message: None,
            next_step: Duration::ZERO,
            ended: false,
        });
        // A step is 100 ms: two minutes of both lives.
        for tick in 0..1200u64 {
            let now = Duration::from_millis(100 * tick);
            for replica in &mut replicas {
                // The server takes a message in whether its sender is awake or not.
                if let Some((arrives, message)) = replica.message.clone().filter(|(arrives, _)| *arrives <= now) {
                    let delay = delays.next().expect("it is a cycle");
                    let back = arrives + Duration::from_millis(delay.back);
                    match message {
                        Message::Read => replica.message = Some((back, Message::Answer(stored.clone()))),
                        Message::Write(wanted) => {
                            let fits = stored.as_ref().map_or("", |stored| stored.version.as_str()) == wanted.version;
                            if fits {
                                version += 1;
                                stored = Some(Record { version: version.to_string(), ..wanted });
                            }
                            let answer = stored.clone().filter(|_| fits && !delay.lost);
                            // A conflict or a lost answer: nothing is learnt, the next step reads.
                            replica.message = answer.map(|record| (back, Message::Answer(Some(record))));
                        }
                        Message::Answer(_) => {}
                    }
                }
                if replica.ended || replica.asleep_until > now {
                    continue;
                }
                let clock = replica.clock(now);
                match replica.message.clone() {
                    Some((arrives, Message::Answer(record))) if arrives <= now => {
                        replica.elector.observe(clock, record);
                        replica.message = None;
                        let decision = replica.elector.decide(clock);
                        if let (Decision::Renew, Some(time)) = (decision, replica.elector.open_until()) {
                            replica.open_until = time;
                            led += 1;
                        }
                        if decision == Decision::Acquire || (decision == Decision::Renew && replica.next_step <= now) {
                            let wanted = replica.elector.write(clock, Timestamp::from_millisecond(now.as_millis() as i64).expect("a time"));
                            let delay = delays.next().expect("it is a cycle");
                            replica.message = Some((now + Duration::from_millis(delay.to_server), Message::Write(wanted)));
                            replica.next_step = now + RENEW_EVERY;
                        }
                    }
                    Some(_) => {}
                    None if replica.next_step <= now => {
                        let delay = delays.next().expect("it is a cycle");
                        replica.message = Some((now + Duration::from_millis(delay.to_server), Message::Read));
                        replica.next_step = now + RENEW_EVERY;
                        replica.asleep_until = now + Duration::from_millis(delay.freeze);
                    }
                    None => {}
                }
                if replica.elector.decide(clock) == Decision::Lost {
                    // The process ends, and another takes its place, with another name.
                    replica.open_until = Duration::ZERO;
                    replica.elector = Elector::new(format!("{}-{tick}", replica.elector.identity));
                    replica.message = None;
                }
            }
            prop_assert!(
                !(replicas[0].is_open(now) && replicas[1].is_open(now)),
                "both pass at {now:?}"
            );
        }
        prop_assert!(led > 0, "nobody ever led");
    }
}
