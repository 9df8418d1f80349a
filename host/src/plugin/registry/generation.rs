//! A generation: one version of a plugin under one configuration. The chain: all active generations
//! at one moment.

use std::sync::Arc;
use std::time::Instant;

use super::health::{Health, HealthReport};
use super::settings::Settings;
use crate::event::{ChainMember, ChainMembers, Name};
use crate::plugin::runtime::plugin::{file_hash, short_hash};
use crate::plugin::{Plugin, Role};

/// One version of one plugin, under one configuration.
#[derive(Debug)]
pub struct Generation {
    pub plugin: Plugin,
    /// 1 for the first generation of this name in this process.
    pub number: u64,
    pub settings: Settings,
    /// The health of each role: a filter that keeps everything must not hide a router that always
    /// fails.
    filter: Option<Health>,
    router: Option<Health>,
}

impl Generation {
    /// `is_on_probation`: there is another generation to roll back to.
    pub(super) fn new(
        plugin: Plugin,
        number: u64,
        settings: Settings,
        is_on_probation: bool,
        now: Instant,
    ) -> Self {
        let of = |role| {
            plugin
                .has_role(role)
                .then(|| Health::new(settings.policy(), is_on_probation, now))
        };
        Self {
            filter: of(Role::Filter),
            router: of(Role::Router),
            plugin,
            number,
            settings,
        }
    }

    /// # Panics
    /// The plugin does not have this role.
    pub(crate) fn health(&self, role: Role) -> &Health {
        let health = match role {
            Role::Filter => &self.filter,
            Role::Router => &self.router,
        };
        health
            .as_ref()
            .expect("a plugin is called only in roles that it has")
    }

    /// The generation as decision records name it.
    pub(crate) fn member(&self) -> ChainMember {
        ChainMember {
            plugin: self.plugin.name().to_string(),
            generation: self.number,
            hash: short_hash(self.plugin.hash()),
            config_hash: short_hash(self.plugin.config_hash()),
        }
    }

    fn healths(&self) -> impl Iterator<Item = &Health> {
        self.filter.iter().chain(&self.router)
    }

    /// Ends the probation; called when there is no longer a generation to roll back to.
    pub(super) fn end_probation(&self) {
        self.healths().for_each(Health::end_probation);
    }

    /// Whether the generation has no probation, or has passed it in all roles.
    pub(super) fn is_proven(&self, now: Instant) -> bool {
        self.healths().all(|health| health.is_proven(now))
    }

    /// The health of the role in the worse state.
    pub(super) fn report(&self, now: Instant) -> HealthReport {
        self.healths()
            .map(|health| health.report(now))
            .max_by_key(HealthReport::severity)
            .unwrap_or_default()
    }
}

/// All active plugins at one moment. A holder of a chain finishes its work on it, even after a
/// swap.
#[derive(Debug, Default)]
pub struct Chain {
    /// In calling order. A plugin that is both filter and router is in both lists.
    pub filters: Vec<Arc<Generation>>,
    pub routers: Vec<Arc<Generation>>,
    identity: Arc<ChainIdentity>,
}

/// A chain as decision records name it. Does not keep its plugins.
#[derive(Debug, Default)]
pub struct ChainIdentity {
    /// A hash of the members, and so equal for equal members on all nodes. Empty without any.
    pub id: String,
    pub members: ChainMembers,
}

impl Chain {
    /// Keeps the order of the generations.
    pub(super) fn new<'a>(generations: impl Iterator<Item = &'a Arc<Generation>> + Clone) -> Self {
        let of_role = |role| {
            generations
                .clone()
                .filter(|generation| generation.plugin.has_role(role))
                .cloned()
                .collect()
        };
        Self::of(of_role(Role::Filter), of_role(Role::Router))
    }

    fn of(filters: Vec<Arc<Generation>>, routers: Vec<Arc<Generation>>) -> Self {
        if filters.is_empty() && routers.is_empty() {
            return Self::default();
        }
        let of = |generations: &[Arc<Generation>]| {
            let members = generations.iter().map(|generation| generation.member());
            members.collect()
        };
        let members = ChainMembers {
            filters: of(&filters),
            routers: of(&routers),
        };
        let text = serde_json::to_vec(&members).expect("texts and numbers are JSON");
        let identity = ChainIdentity {
            id: short_hash(&file_hash(&text)),
            members,
        };
        Self {
            filters,
            routers,
            identity: Arc::new(identity),
        }
    }

    pub(crate) fn identity(&self) -> &Arc<ChainIdentity> {
        &self.identity
    }

    /// A copy with this generation in place of the one with the same plugin name.
    pub(super) fn with(&self, other: &Arc<Generation>) -> Self {
        let in_place = |generation: &Arc<Generation>| {
            let is_its = generation.plugin.name() == other.plugin.name();
            Arc::clone(if is_its { other } else { generation })
        };
        Self::of(
            self.filters.iter().map(in_place).collect(),
            self.routers.iter().map(in_place).collect(),
        )
    }

    pub fn is_empty(&self) -> bool {
        self.filters.is_empty() && self.routers.is_empty()
    }

    /// Iterates over each plugin once.
    pub(super) fn generations(&self) -> impl Iterator<Item = &Arc<Generation>> {
        self.filters.iter().chain(
            self.routers
                .iter()
                .filter(|generation| !generation.plugin.has_role(Role::Filter)),
        )
    }

    /// Whether this generation belongs to this chain.
    pub(crate) fn has(&self, name: &Name, number: u64) -> bool {
        self.generations()
            .any(|generation| generation.plugin.name() == name && generation.number == number)
    }
}
