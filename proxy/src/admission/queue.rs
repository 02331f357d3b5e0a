//! Who waits and who goes next: the arithmetic of admission, without tasks, locks or a clock.
//!
//! * Between classes the higher goes first. So that the lower ones don't starve, one place in [`AGED_EVERY`] goes to whoever
//!   has waited longest, once that is longer than [`AGED`]: a flood of urgent requests keeps all but one place in eight.
//! * Within a class tenants share by cost, not by count: start-time fair queueing. Each tenant has a tag, which moves on by
//!   the cost of what it was served, and the lowest tag goes next; a tenant that was idle starts at the tag of the last one
//!   served, so it neither saves up nor pays for what it did when nobody waited. Two tenants that both wait are served the
//!   same cost, to within the largest request of each.
//! * When the queue is full, the lowest class loses a request, the newest of the tenant that has most in it. That may be the
//!   newcomer; it is never somebody of a higher class, nor somebody who has waited while others of the tenant came later.
//!   To drop simply the newest would let one tenant fill the queue and shut everybody else out.
//!
//! A place is given in logarithmic time, skipping tenants that are at a bound of their own. Only a full queue looks at all
//! tenants of its lowest class, for whom it hits.

use super::class::Class;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// One place in so many goes to whoever has waited longest.
const AGED_EVERY: u64 = 8;

/// The wait from which that holds: the order of the first token that a patient client expects under load.
const AGED: Duration = Duration::from_secs(10);

/// Over how long the rate of places that become free is averaged: long enough for answers that take seconds.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// The least and the most a client is told to wait. More than a minute is a guess that nobody should plan with.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Bounds of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Requests that are served at once.
    pub(crate) in_flight_max: usize,
    /// Requests that wait; 0 sheds whatever can't be served at once.
    pub(crate) queued_max: usize,
    /// Bytes of their bodies.
    pub(crate) queued_bytes_max: usize,
}

/// A request as admission sees it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) class: Class,
    pub(crate) tenant: Arc<str>,
    /// Requests of the tenant that are served at once, if that is bounded.
    pub(crate) tenant_in_flight_max: Option<usize>,
    /// What it takes to serve, in any unit that is the same for all, say tokens; 0 counts as 1.
    pub(crate) cost: u64,
    /// Bytes that it occupies while it waits.
    pub(crate) bytes: usize,
}

/// A request in the queue. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// What becomes of a request at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It is served.
    Entered,
    /// It waits. Those in `evicted` don't any more: their places went to it.
    Queued { ticket: Ticket, evicted: Vec<Evicted> },
    /// There is no room for it.
    Shed,
}

/// A request that has lost its place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Evicted {
    pub(crate) ticket: Ticket,
    pub(crate) class: Class,
}

/// A request that may be served now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Admitted {
    pub(crate) ticket: Ticket,
    pub(crate) tenant: Arc<str>,
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    since: Instant,
}

/// The requests of one tenant in one class.
#[derive(Debug, Default)]
struct Flow {
    /// Where its next request starts, in served cost.
    tag: u64,
    tickets: BTreeSet<Ticket>,
    bytes: usize,
}

/// The tenants of one class.
#[derive(Debug, Default)]
struct Flows {
    /// The tag of the request that was served last.
    served: u64,
    by_tenant: HashMap<Arc<str>, Flow>,
    /// The first of each tenant that waits, in the order in which they are served.
    heads: BTreeSet<(u64, Ticket, Arc<str>)>,
    /// Tenants of whom nobody waits and who are ahead of the others. They are kept until those have caught up, or a tenant
    /// would begin anew by leaving.
    ahead: BTreeSet<(u64, Arc<str>)>,
    count: usize,
}

/// The queue in front of what is served at once.
#[derive(Debug)]
pub(crate) struct Queue {
    limits: Limits,
    in_flight: usize,
    in_flight_by_tenant: HashMap<Arc<str>, usize>,
    classes: [Flows; Class::COUNT],
    waiting: BTreeMap<Ticket, Waiting>,
    bytes: usize,
    next_ticket: u64,
    /// Places given since somebody who had waited long went first.
    since_aged: u64,
    rate: Rate,
    shed: [u64; Class::COUNT],
}

impl Queue {
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        Queue {
            limits,
            in_flight: 0,
            in_flight_by_tenant: HashMap::new(),
            classes: Default::default(),
            waiting: BTreeMap::new(),
            bytes: 0,
            next_ticket: 0,
            since_aged: 0,
            rate: Rate { places: 0.0, at: now },
            shed: [0; Class::COUNT],
        }
    }

    /// A request comes.
    pub(crate) fn enter(&mut self, request: Request, now: Instant) -> Entry {
        // Whoever waits while there is room waits for a place of its own tenant, so nobody is overtaken.
        if self.in_flight < self.limits.in_flight_max && self.tenant_has_room(&request) {
            self.serve(&request.tenant);
            return Entry::Entered;
        }
        let class = request.class;
        let never_fits = self.limits.queued_max == 0 || request.bytes > self.limits.queued_bytes_max;
        if never_fits || request.tenant_in_flight_max == Some(0) {
            self.shed[class.index()] += 1;
            return Entry::Shed;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.insert(ticket, Waiting { request, since: now });
        let mut evicted: Vec<(Ticket, Waiting)> = Vec::new();
        while self.waiting.len() > self.limits.queued_max || self.bytes > self.limits.queued_bytes_max {
            let victim = self.victim();
            let waiting = self.remove(victim).expect("a victim is one of those who wait");
            if victim == ticket {
                // It does not fit even so: nobody loses a place for nothing.
                evicted.into_iter().for_each(|(ticket, waiting)| self.insert(ticket, waiting));
                self.shed[class.index()] += 1;
                return Entry::Shed;
            }
            evicted.push((victim, waiting));
        }
        let evicted: Vec<Evicted> =
            evicted.into_iter().map(|(ticket, waiting)| Evicted { ticket, class: waiting.request.class }).collect();
        for Evicted { class, .. } in &evicted {
            self.shed[class.index()] += 1;
        }
        Entry::Queued { ticket, evicted }
    }

    /// A request of the tenant is no longer served. Whoever goes next is served from now on.
    pub(crate) fn leave(&mut self, tenant: &str, now: Instant) -> Vec<Admitted> {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(count) = self.in_flight_by_tenant.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                self.in_flight_by_tenant.remove(tenant);
            }
        }
        self.rate.place(now);
        let mut admitted = Vec::new();
        while self.in_flight < self.limits.in_flight_max {
            let Some(ticket) = self.next(now) else { break };
            let waiting = self.remove_served(ticket);
            self.serve(&waiting.request.tenant);
            admitted.push(Admitted { ticket, tenant: waiting.request.tenant });
        }
        admitted
    }

    /// A request waits no more, by its own will. Says whether it still waited.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> bool {
        self.remove(ticket).is_some()
    }

    /// When a request of this class that finds no room may find some: what would go before it, at the rate of now.
    pub(crate) fn retry_after(&self, class: Class, now: Instant) -> Duration {
        let before: usize = self.classes[class.index()..].iter().map(|flows| flows.count).sum();
        self.rate.time_for(before + 1, now)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many wait.
    pub(crate) fn queued(&self, class: Class) -> usize {
        self.classes[class.index()].count
    }

    /// How many were turned away, newcomers and those who lost their place.
    pub(crate) fn shed(&self, class: Class) -> u64 {
        self.shed[class.index()]
    }

    fn tenant_has_room(&self, request: &Request) -> bool {
        let in_flight = self.in_flight_by_tenant.get(&request.tenant).copied().unwrap_or(0);
        request.tenant_in_flight_max.is_none_or(|max| in_flight < max)
    }

    fn serve(&mut self, tenant: &Arc<str>) {
        self.in_flight += 1;
        *self.in_flight_by_tenant.entry(Arc::clone(tenant)).or_default() += 1;
    }

    /// Who goes next, if anybody may.
    fn next(&mut self, now: Instant) -> Option<Ticket> {
        if self.waiting.is_empty() {
            return None;
        }
        self.since_aged += 1;
        if self.since_aged >= AGED_EVERY {
            let aged =
                self.waiting.iter().take_while(|(_, waiting)| now.saturating_duration_since(waiting.since) > AGED);
            let aged =
                aged.filter(|(_, waiting)| self.tenant_has_room(&waiting.request)).map(|(ticket, _)| *ticket).next();
            if aged.is_some() {
                self.since_aged = 0;
                return aged;
            }
        }
        let heads = self.classes.iter().rev().flat_map(|flows| &flows.heads).map(|(_, ticket, _)| *ticket);
        heads.into_iter().find(|ticket| self.tenant_has_room(&self.waiting[ticket].request))
    }

    /// Who loses its place: of the lowest class the newest of the tenant that has most there, the newest such tenant where
    /// several have the same.
    fn victim(&self) -> Ticket {
        let too_long = self.bytes > self.limits.queued_bytes_max;
        let lowest = self.classes.iter().find(|flows| flows.count > 0);
        let newest = lowest.into_iter().flat_map(|flows| flows.by_tenant.values()).filter_map(|flow| {
            let newest = *flow.tickets.last()?;
            Some((if too_long { flow.bytes } else { flow.tickets.len() }, newest))
        });
        newest.max().expect("a queue over its bound holds somebody").1
    }

    fn insert(&mut self, ticket: Ticket, waiting: Waiting) {
        let Request { class, tenant, bytes, .. } = &waiting.request;
        self.classes[class.index()].change(tenant, |flow| {
            flow.tickets.insert(ticket);
            flow.bytes += bytes;
        });
        self.bytes += bytes;
        self.waiting.insert(ticket, waiting);
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Waiting> {
        let waiting = self.waiting.remove(&ticket)?;
        let Request { class, tenant, bytes, .. } = &waiting.request;
        self.classes[class.index()].change(tenant, |flow| {
            flow.tickets.remove(&ticket);
            flow.bytes -= bytes;
        });
        self.bytes -= bytes;
        Some(waiting)
    }

    fn remove_served(&mut self, ticket: Ticket) -> Waiting {
        let request = &self.waiting[&ticket].request;
        let (cost, flows) = (request.cost.max(1), &mut self.classes[request.class.index()]);
        let mut tag = 0;
        flows.change(&request.tenant, |flow| {
            tag = flow.tag;
            flow.tag = flow.tag.saturating_add(cost);
        });
        // A tenant that waited for its own bound is behind, and does not take the others back with it.
        flows.served = flows.served.max(tag);
        self.remove(ticket).expect("it waits")
    }
}

impl Flows {
    /// Changes a tenant's flow and keeps its place in the order.
    fn change(&mut self, tenant: &Arc<str>, change: impl FnOnce(&mut Flow)) {
        let flow = self.by_tenant.entry(Arc::clone(tenant)).or_default();
        match flow.tickets.first() {
            Some(first) => {
                self.heads.remove(&(flow.tag, *first, Arc::clone(tenant)));
            }
            None => {
                self.ahead.remove(&(flow.tag, Arc::clone(tenant)));
                flow.tag = flow.tag.max(self.served);
            }
        }
        self.count -= flow.tickets.len();
        change(flow);
        self.count += flow.tickets.len();
        match flow.tickets.first() {
            Some(first) => {
                self.heads.insert((flow.tag, *first, Arc::clone(tenant)));
            }
            None => {
                self.ahead.insert((flow.tag, Arc::clone(tenant)));
            }
        }
        self.forget();
    }

    /// Forgets tenants that are ahead of nobody.
    fn forget(&mut self) {
        let nobody_waits = self.count == 0;
        while self.ahead.first().is_some_and(|(tag, _)| nobody_waits || *tag <= self.served) {
            let (_, tenant) = self.ahead.pop_first().expect("there is a first");
            self.by_tenant.remove(&tenant);
        }
        if nobody_waits {
            self.served = 0;
        }
    }
}

/// How many places become free in a second, as of late: an average whose memory fades.
#[derive(Debug)]
struct Rate {
    places: f64,
    at: Instant,
}

impl Rate {
    fn place(&mut self, now: Instant) {
        self.places = self.faded(now) + 1.0;
        self.at = now;
    }

    fn faded(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at);
        self.places * (-passed.as_secs_f64() / RATE_WINDOW.as_secs_f64()).exp()
    }

    fn time_for(&self, places: usize, now: Instant) -> Duration {
        let seconds = places as f64 * RATE_WINDOW.as_secs_f64() / self.faded(now);
        let waits = Duration::try_from_secs_f64(seconds.ceil()).unwrap_or(RETRY_AFTER_MAX);
        waits.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { in_flight_max: 1, queued_max: 100, queued_bytes_max: 1_000 };
    const SECOND: Duration = Duration::from_secs(1);

    fn request(class: Class, tenant: &str) -> Request {
        Request { class, tenant: tenant.into(), tenant_in_flight_max: None, cost: 10, bytes: 10 }
    }

    /// A queue in which everything waits: one request of another tenant is served.
    fn busy(limits: Limits) -> (Queue, Instant) {
        let now = Instant::now();
        let mut queue = Queue::new(limits, now);
        for _ in 0..limits.in_flight_max {
            assert_eq!(queue.enter(request(Class::NORMAL, "first"), now), Entry::Entered);
        }
        (queue, now)
    }

    fn queued(queue: &mut Queue, request: Request, now: Instant) -> Ticket {
        match queue.enter(request, now) {
            Entry::Queued { ticket, .. } => ticket,
            entry => panic!("{entry:?}"),
        }
    }

    fn evicted(entry: Entry) -> Vec<Ticket> {
        match entry {
            Entry::Queued { evicted, .. } => evicted.into_iter().map(|evicted| evicted.ticket).collect(),
            entry => panic!("{entry:?}"),
        }
    }

    /// Serves all that wait, one after the other, and says in which order.
    fn drain(queue: &mut Queue, now: Instant) -> Vec<Ticket> {
        let (mut order, mut tenant): (_, Arc<str>) = (Vec::new(), "first".into());
        while let Some(admitted) = queue.leave(&tenant, now).pop() {
            order.push(admitted.ticket);
            tenant = admitted.tenant;
        }
        order
    }

    #[test]
    fn the_higher_class_goes_first_and_equals_in_their_order() {
        let (mut queue, now) = busy(LIMITS);
        let classes = [Class::LOW, Class::NORMAL, Class::CRITICAL, Class::HIGH, Class::CRITICAL];
        let tickets = classes.map(|class| queued(&mut queue, request(class, "a"), now));
        assert_eq!(drain(&mut queue, now), [2, 4, 3, 1, 0].map(|index| tickets[index]));
    }

    #[test]
    fn tenants_share_by_cost() {
        let (mut queue, now) = busy(LIMITS);
        let many = [(); 4].map(|()| queued(&mut queue, request(Class::NORMAL, "many"), now));
        let large = [(); 2].map(|()| queued(&mut queue, Request { cost: 20, ..request(Class::NORMAL, "large") }, now));
        let order = drain(&mut queue, now);
        assert_eq!(order, [many[0], large[0], many[1], many[2], large[1], many[3]]);
    }

    #[test]
    fn a_tenant_that_comes_late_neither_waits_for_all_others_nor_overtakes_them_all() {
        let (mut queue, now) = busy(LIMITS);
        let early = [(); 6].map(|()| queued(&mut queue, request(Class::NORMAL, "early"), now));
        let served: Vec<Admitted> =
            ["first", "early", "early"].map(|t| queue.leave(t, now)).into_iter().flatten().collect();
        assert_eq!(served.iter().map(|a| a.ticket).collect::<Vec<_>>(), early[..3]);
        let late = [(); 3].map(|()| queued(&mut queue, request(Class::NORMAL, "late"), now));
        assert_eq!(drain(&mut queue, now), [late[0], early[3], late[1], early[4], late[2], early[5]]);
    }

    #[test]
    fn somebody_who_has_waited_long_gets_one_place_in_eight() {
        let (mut queue, mut now) = busy(LIMITS);
        let low = [(); 2].map(|()| queued(&mut queue, request(Class::LOW, "a"), now));
        now += AGED + SECOND;
        let critical: Vec<Ticket> = (0..20).map(|_| queued(&mut queue, request(Class::CRITICAL, "b"), now)).collect();
        let order = drain(&mut queue, now);
        let place = |ticket| order.iter().position(|served| *served == ticket);
        assert_eq!([place(low[0]), place(low[1])], [Some(7), Some(15)]);
        assert_eq!(order.len(), critical.len() + low.len());
    }

    #[test]
    fn a_tenant_at_its_bound_waits_and_others_pass() {
        let (mut queue, now) = busy(Limits { in_flight_max: 2, ..LIMITS });
        let capped = || Request { tenant_in_flight_max: Some(1), ..request(Class::NORMAL, "capped") };
        let first = queued(&mut queue, capped(), now);
        let second = queued(&mut queue, capped(), now);
        assert_eq!(queue.leave("first", now), [Admitted { ticket: first, tenant: "capped".into() }]);
        assert_eq!(queue.leave("first", now), []);
        assert_eq!(queue.enter(request(Class::LOW, "other"), now), Entry::Entered);
        assert_eq!(queue.leave("capped", now), [Admitted { ticket: second, tenant: "capped".into() }]);
    }

    #[test]
    fn a_full_queue_loses_the_newest_of_its_lowest_class() {
        let (mut queue, now) = busy(Limits { queued_max: 3, ..LIMITS });
        let low = ["a", "b", "c"].map(|tenant| queued(&mut queue, request(Class::LOW, tenant), now));
        assert_eq!(queue.enter(request(Class::LOW, "d"), now), Entry::Shed);
        assert_eq!(evicted(queue.enter(request(Class::CRITICAL, "d"), now)), [low[2]]);
        assert_eq!(evicted(queue.enter(request(Class::NORMAL, "d"), now)), [low[1]]);
        assert_eq!(evicted(queue.enter(request(Class::NORMAL, "d"), now)), [low[0]]);
        assert_eq!(queue.enter(request(Class::LOW, "a"), now), Entry::Shed);
        assert_eq!([Class::LOW, Class::NORMAL, Class::CRITICAL].map(|class| queue.shed(class)), [5, 0, 0]);
    }

    #[test]
    fn a_tenant_that_fills_the_queue_loses_places_to_others() {
        let (mut queue, now) = busy(Limits { queued_max: 4, ..LIMITS });
        let flood = [(); 4].map(|()| queued(&mut queue, request(Class::LOW, "flood"), now));
        for (tenant, expect) in [("a", vec![flood[3]]), ("a", vec![flood[2]])] {
            assert_eq!(evicted(queue.enter(request(Class::LOW, tenant), now)), expect);
        }
        assert_eq!(queue.enter(request(Class::LOW, "a"), now), Entry::Shed, "now it has as much as the other");
    }

    #[test]
    fn nobody_loses_a_place_to_a_body_that_does_not_fit_even_so() {
        let (mut queue, now) = busy(Limits { queued_bytes_max: 100, ..LIMITS });
        let critical = queued(&mut queue, Request { bytes: 60, ..request(Class::CRITICAL, "a") }, now);
        let low = queued(&mut queue, Request { bytes: 30, ..request(Class::LOW, "b") }, now);
        assert_eq!(queue.enter(Request { bytes: 90, ..request(Class::HIGH, "c") }, now), Entry::Shed);
        assert_eq!(queue.enter(Request { bytes: 101, ..request(Class::CRITICAL, "c") }, now), Entry::Shed);
        assert_eq!(queue.bytes(), 90);
        assert_eq!(evicted(queue.enter(Request { bytes: 40, ..request(Class::HIGH, "c") }, now)), [low]);
        assert_eq!(drain(&mut queue, now)[0], critical);
    }

    #[test]
    fn a_client_is_told_to_wait_by_the_rate_of_now() {
        let (mut queue, mut now) = busy(LIMITS);
        assert_eq!(queue.retry_after(Class::LOW, now), RETRY_AFTER_MAX, "nothing is known");
        for _ in 0..200 {
            now += SECOND / 2;
            queue.leave("first", now);
            queue.enter(request(Class::NORMAL, "first"), now);
        }
        assert_eq!(queue.retry_after(Class::LOW, now), RETRY_AFTER_MIN);
        for _ in 0..19 {
            queued(&mut queue, request(Class::HIGH, "a"), now);
        }
        let low = queue.retry_after(Class::LOW, now).as_secs();
        assert!((9..=11).contains(&low), "20 places at 2 a second: {low} s");
        assert_eq!(queue.retry_after(Class::CRITICAL, now), RETRY_AFTER_MIN);
    }

    fn any_request() -> impl Strategy<Value = Request> {
        (0_u64..8, 0_u8..4, 0_u64..50, 0_usize..60).prop_map(|(class, tenant, cost, bytes)| Request {
            class: class.try_into().expect("a class"),
            tenant: format!("{tenant}").into(),
            tenant_in_flight_max: (tenant == 0).then_some(1),
            cost,
            bytes,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// Against a model that knows only who waits and who is served.
        #[test]
        fn bounds_hold_and_nobody_is_lost_or_served_twice(
            steps in prop::collection::vec((0_u8..5, any_request(), any::<prop::sample::Index>(), 0_u64..5), 0..150),
        ) {
            let limits = Limits { in_flight_max: 3, queued_max: 6, queued_bytes_max: 200 };
            let mut now = Instant::now();
            let mut queue = Queue::new(limits, now);
            let mut waiting: BTreeMap<Ticket, Request> = BTreeMap::new();
            let mut served: Vec<Arc<str>> = Vec::new();
            for (kind, request, index, seconds) in steps {
                now += SECOND * u32::try_from(seconds).expect("small");
                match kind {
                    0..=2 => match queue.enter(request.clone(), now) {
                        Entry::Entered => served.push(request.tenant),
                        Entry::Queued { ticket, evicted } => {
                            let class = request.class;
                            prop_assert!(waiting.insert(ticket, request).is_none());
                            for Evicted { ticket, class: lost } in evicted {
                                let evicted = waiting.remove(&ticket).expect("only who waits is evicted");
                                prop_assert!(evicted.class == lost && lost <= class);
                            }
                        }
                        Entry::Shed => {}
                    },
                    3 if !served.is_empty() => {
                        let tenant = served.swap_remove(index.index(served.len()));
                        for Admitted { ticket, tenant } in queue.leave(&tenant, now) {
                            prop_assert_eq!(&waiting.remove(&ticket).expect("only who waits is served").tenant, &tenant);
                            served.push(tenant);
                        }
                    }
                    4 if !waiting.is_empty() => {
                        let ticket = *index.get(&waiting.keys().copied().collect::<Vec<_>>());
                        waiting.remove(&ticket);
                        prop_assert!(queue.cancel(ticket));
                        prop_assert!(!queue.cancel(ticket));
                    }
                    _ => {}
                }
                prop_assert!(served.len() <= limits.in_flight_max && waiting.len() <= limits.queued_max);
                prop_assert!(served.iter().filter(|tenant| &***tenant == "0").count() <= 1, "over the tenant's bound");
                prop_assert_eq!(queue.in_flight(), served.len());
                prop_assert_eq!(queue.bytes(), waiting.values().map(|request| request.bytes).sum::<usize>());
                prop_assert_eq!(Class::all().map(|class| queue.queued(class)).sum::<usize>(), waiting.len());
                // Nobody waits beside a free place, unless its tenant has no room.
                let may_go = waiting.values().any(|request| {
                    let served = served.iter().filter(|tenant| **tenant == request.tenant).count();
                    request.tenant_in_flight_max.is_none_or(|max| served < max)
                });
                prop_assert!(served.len() == limits.in_flight_max || !may_go, "somebody waits for nothing");
            }
            while let Some(tenant) = served.pop() {
                served.extend(queue.leave(&tenant, now).into_iter().map(|admitted| admitted.tenant));
            }
            prop_assert_eq!((queue.in_flight(), queue.bytes(), queue.waiting.len()), (0, 0, 0));
            prop_assert!(queue.in_flight_by_tenant.is_empty());
            prop_assert!(queue.classes.iter().all(|flows| flows.by_tenant.is_empty()));
        }

        #[test]
        fn tenants_that_all_wait_are_served_the_same_cost(costs in prop::collection::vec(1_u64..50, 30..100)) {
            let (mut queue, now) = busy(Limits { queued_max: 1_000, queued_bytes_max: 100_000, ..LIMITS });
            let mut cost_of = HashMap::new();
            for (index, cost) in costs.iter().enumerate() {
                let tenant = ["a", "b", "c"][index % 3];
                let ticket = queued(&mut queue, Request { cost: *cost, ..request(Class::NORMAL, tenant) }, now);
                cost_of.insert(ticket, (tenant, *cost));
            }
            let mut left = BTreeMap::from([("a", 0), ("b", 0), ("c", 0)]);
            cost_of.values().for_each(|(tenant, _)| *left.get_mut(tenant).expect("one of three") += 1);
            let mut served = BTreeMap::from([("a", 0), ("b", 0), ("c", 0)]);
            for ticket in drain(&mut queue, now) {
                let (tenant, cost) = cost_of[&ticket];
                *served.get_mut(tenant).expect("one of three") += cost;
                *left.get_mut(tenant).expect("one of three") -= 1;
                if left.values().any(|left| *left == 0) {
                    break;
                }
                let (least, most) = (served.values().min().expect("three"), served.values().max().expect("three"));
                prop_assert!(most - least < 2 * 50, "{:?}", served);
            }
        }

        /// Whatever else comes, of whatever class: nobody waits longer than eight places for each who was there before.
        #[test]
        fn the_lowest_class_does_not_starve(before in 0_usize..6) {
            let (mut queue, mut now) = busy(LIMITS);
            for _ in 0..before {
                queued(&mut queue, request(Class::LOW, "b"), now);
            }
            let low = queued(&mut queue, request(Class::LOW, "a"), now);
            now += AGED + SECOND;
            queued(&mut queue, request(Class::CRITICAL, "urgent"), now);
            let mut tenant: Arc<str> = "first".into();
            let mut places = 0;
            loop {
                queued(&mut queue, request(Class::CRITICAL, "urgent"), now);
                let admitted = queue.leave(&tenant, now).pop().expect("somebody waits");
                places += 1;
                if admitted.ticket == low {
                    break;
                }
                tenant = admitted.tenant;
                prop_assert!(places <= AGED_EVERY * (before as u64 + 1), "still waits after {} places", places);
            }
        }
    }
}
