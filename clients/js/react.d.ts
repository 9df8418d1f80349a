import type { Notification, Options, State } from './index.js';

export interface NotificationsOptions<Data = unknown> extends Omit<Options<Data>, 'user'> {
  /** `null` while no user is signed in: nothing is connected then. */
  user?: string | null;
  /** The most notifications that are kept (100). */
  limit?: number;
}

export interface Notifications<Data = unknown> {
  /** The notifications that arrived since the component was mounted, the newest first. */
  notifications: Notification<Data>[];
  state: State;
  /** Moves the user's read marker, by default to everything shown. */
  markRead: (id?: string) => Promise<void>;
  /** Empties `notifications`. */
  clear: () => void;
}

/**
 * The notifications of one user. A change of the URL, the user or the device opens a new
 * connection; handlers may change on each render.
 */
export function useNotifications<Data = unknown>(url: string | URL | null, options?: NotificationsOptions<Data>): Notifications<Data>;
