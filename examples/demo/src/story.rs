//! The story of the demo: the people of a small company, and a sequence of events with the expected
//! recipients, which are computed here from the people alone. `pointsman.toml` in this folder makes
//! a node reach the same decisions.

use std::time::Duration;

use rand::Rng as _;
use rand::rngs::ThreadRng;
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};

pub(crate) struct Person {
    pub(crate) name: &'static str,
    pub(crate) groups: &'static [&'static str],
    pub(crate) plan: &'static str,
    pub(crate) locale: &'static str,
}

pub(crate) const PEOPLE: [Person; 4] = [
    Person {
        name: "ada",
        groups: &["ops", "lobby"],
        plan: "pro",
        locale: "en",
    },
    Person {
        name: "bo",
        groups: &["ops", "lobby", "kitchen"],
        plan: "free",
        locale: "en",
    },
    Person {
        name: "chen",
        groups: &["shop", "lobby"],
        plan: "pro",
        locale: "de",
    },
    Person {
        name: "dee",
        groups: &["shop", "kitchen"],
        plan: "pro",
        locale: "fr",
    },
];

/// How long a typing indicator is valid.
const TYPING: Duration = Duration::from_secs(4);

/// An event and its expected deliveries.
pub(crate) struct Scene {
    pub(crate) event: Value,
    /// Whether each person should be notified, in the order of [`PEOPLE`].
    pub(crate) recipients: [bool; 4],
    /// The collapse key: a later event with the same key supersedes this one.
    pub(crate) collapse: Option<&'static str>,
    /// The time to live, after which the event is not delivered.
    pub(crate) ttl: Option<Duration>,
}

impl Scene {
    fn new(event: Value, recipients: [bool; 4]) -> Self {
        Self {
            event,
            recipients,
            collapse: None,
            ttl: None,
        }
    }
}

/// State that spans several events.
pub(crate) struct Story {
    random: ThreadRng,
    goals: [u32; 2],
    n_updates: u32,
    n_orders: u32,
}

impl Default for Story {
    fn default() -> Self {
        Self {
            random: rand::rng(),
            goals: [0, 0],
            n_updates: 0,
            n_orders: 4_700,
        }
    }
}

impl Story {
    /// Returns the next event.
    pub(crate) fn next(&mut self) -> Scene {
        match self.random.random_range(0..20) {
            0..6 => self.order(),
            6..11 => self.chat(),
            11..13 => self.mention(),
            13..16 => self.deployment(),
            16..18 => self.stock(),
            18 => self.promotion(),
            _ => self.alert(),
        }
    }

    /// The score of the match. Every update is for everyone and supersedes the earlier ones.
    pub(crate) fn score(&mut self) -> Scene {
        self.n_updates += 1;
        if self.random.random_ratio(1, 12) {
            self.goals[self.random.random_range(0..2)] += 1;
        }
        let minute = 1 + self.n_updates / 4 % 90;
        if minute == 1 {
            self.goals = [0, 0];
        }
        let data = json!({
            "match": "final", "home": "Harbour", "away": "Hill", "goals": self.goals, "minute": minute, "update": self.n_updates
        });
        let event = json!({ "type": "match.score", "source": "/stadium", "data": data });
        Scene {
            collapse: Some("final"),
            ..Scene::new(event, [true; 4])
        }
    }

    fn order(&mut self) -> Scene {
        let who = self.random.random_range(0..PEOPLE.len());
        self.n_orders += 1;
        let (kind, mut data) = match self.random.random_range(0..3) {
            0 => {
                let total = format!(
                    "{}.{:02}",
                    self.random.random_range(9..200),
                    self.random.random_range(0..100)
                );
                (
                    "order.placed",
                    json!({ "items": self.random.random_range(2..9), "total": total }),
                )
            }
            1 => {
                let carrier = self.pick(&["Kite", "Barge", "Night Mail"]);
                (
                    "order.shipped",
                    json!({ "parcels": self.random.random_range(2..5), "carrier": carrier }),
                )
            }
            _ => {
                let reason = self.pick(&["fog in the harbour", "a missing box", "a strike"]);
                (
                    "order.delayed",
                    json!({ "days": self.random.random_range(2..5), "reason": reason }),
                )
            }
        };
        data["order"] = json!(self.n_orders);
        data["customer"] = json!(PEOPLE[who].name);
        Scene::new(
            json!({ "type": kind, "source": "/shop", "data": data }),
            std::array::from_fn(|n| n == who),
        )
    }

    /// A message in a chat room, or a typing indicator.
    fn chat(&mut self) -> Scene {
        let room = self.pick(&["lobby", "lobby", "kitchen"]);
        let from = self.member(room);
        if self.random.random_ratio(1, 3) {
            let event = json!({
                "type": "chat.typing", "source": "/chat", "group": room, "priority": "low", "ttl": TYPING.as_secs(),
                "data": { "room": room, "from": from }
            });
            return Scene {
                ttl: Some(TYPING),
                ..Scene::new(event, members(room))
            };
        }
        let text = self.pick(&[
            "Lunch at one?",
            "Who has the keys?",
            "Done, have a look.",
            "The good bread is back.",
            "Back in five.",
            "Ship it!",
        ]);
        let data = json!({ "room": room, "from": from, "text": text });
        Scene::new(
            json!({ "type": "chat.message", "source": "/chat", "group": room, "data": data }),
            members(room),
        )
    }

    /// A mention. One router addresses the user directly and another through the chat room, but
    /// only one notification is delivered.
    fn mention(&mut self) -> Scene {
        let text = self.pick(&["could you look at this?", "your turn.", "there is cake."]);
        let data = json!({ "room": "lobby", "from": "bo", "mentioned": "ada", "text": text });
        Scene::new(
            json!({ "type": "chat.mention", "source": "/chat", "group": "lobby", "data": data }),
            members("lobby"),
        )
    }

    fn deployment(&mut self) -> Scene {
        let version = format!("2.{}.0", self.random.random_range(10..40));
        let service = self.pick(&["checkout", "search", "ledger"]);
        let (kind, data) = match self.random.random_range(0..4) {
            0..2 => (
                "deployment.started",
                json!({ "service": service, "version": version }),
            ),
            2 => (
                "deployment.finished",
                json!({ "service": service, "version": version, "seconds": self.random.random_range(20..90) }),
            ),
            _ => (
                "deployment.failed",
                json!({ "service": service, "version": version, "reason": "the health check timed out" }),
            ),
        };
        Scene::new(
            json!({ "type": kind, "source": "/ci", "data": data }),
            members("ops"),
        )
    }

    fn stock(&mut self) -> Scene {
        let data = json!({ "article": self.pick(&["Blue kettle", "Oak tray", "Lantern"]), "left": self.random.random_range(0..6) });
        Scene::new(
            json!({ "type": "stock.low", "source": "/warehouse", "data": data }),
            members("shop"),
        )
    }

    fn promotion(&mut self) -> Scene {
        let data = json!({ "percent": 5 * self.random.random_range(2..6), "collection": self.pick(&["Tide", "Meadow"]) });
        let recipients = PEOPLE
            .each_ref()
            .map(|person| person.plan == "pro" && ["en", "de"].contains(&person.locale));
        Scene::new(
            json!({ "type": "shop.promotion", "source": "/shop", "data": data }),
            recipients,
        )
    }

    fn alert(&mut self) -> Scene {
        let (severity, system, text) = self.pick(&[
            ("critical", "Payments", "the card provider is down"),
            ("warning", "Search", "answers take 900 ms"),
        ]);
        let data = json!({ "severity": severity, "system": system, "text": text });
        Scene::new(
            json!({ "type": "system.alert", "source": "/monitor", "data": data }),
            [true; 4],
        )
    }

    fn member(&mut self, group: &str) -> &'static str {
        let members: Vec<&str> = PEOPLE
            .iter()
            .filter(|person| person.groups.contains(&group))
            .map(|person| person.name)
            .collect();
        members
            .choose(&mut self.random)
            .copied()
            .unwrap_or("nobody")
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.random.random_range(0..choices.len())]
    }
}

fn members(group: &str) -> [bool; 4] {
    PEOPLE
        .each_ref()
        .map(|person| person.groups.contains(&group))
}
