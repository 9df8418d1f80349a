// Publishes messages to Redis with ioredis: a JSON list of [command, channel, message] as the only
// argument. REDIS_URL names the server.
import Redis from "ioredis";

const redis = new Redis(process.env.REDIS_URL);
for (const [command, channel, message] of JSON.parse(process.argv[2])) {
  const receivers = command === "spublish" ? await redis.spublish(channel, message) : await redis.publish(channel, message);
  if (receivers !== 1) throw new Error(`${command} ${channel}: ${receivers} receivers`);
}
await redis.quit();
