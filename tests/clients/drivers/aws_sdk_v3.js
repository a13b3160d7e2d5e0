// The AWS SDK for JavaScript, version 3, driven as clients/driving.py says.
const {
  BundleInstanceCommand,
  CancelBundleTaskCommand,
  DescribeBundleTasksCommand,
  EC2Client,
  EC2ServiceException,
  waitUntilBundleTaskComplete,
} = require("@aws-sdk/client-ec2");

const [action, endpoint, ...rest] = process.argv.slice(2);
const client = new EC2Client({ endpoint, region: process.env.AWS_DEFAULT_REGION, maxAttempts: 1 });
const shown = (task) => ({ id: task.BundleId, state: task.State });

const actions = {
  async bundle(instance, bucket, prefix, policy, signature, dryRun) {
    const S3 = {
      AWSAccessKeyId: process.env.AWS_ACCESS_KEY_ID,
      Bucket: bucket,
      Prefix: prefix,
      UploadPolicy: Buffer.from(policy),
      UploadPolicySignature: signature,
    };
    const input = { InstanceId: instance, Storage: { S3 }, DryRun: dryRun };
    return shown((await client.send(new BundleInstanceCommand(input))).BundleTask);
  },
  "dry-run": (...given) => actions.bundle(...given, true),
  async describe(prefix) {
    const input = { Filters: [{ Name: "s3-prefix", Values: [prefix] }] };
    return { tasks: (await client.send(new DescribeBundleTasksCommand(input))).BundleTasks.map(shown) };
  },
  async wait(id) {
    const input = { BundleIds: [id] };
    await waitUntilBundleTaskComplete({ client, maxWaitTime: 60, minDelay: 1, maxDelay: 1 }, input);
    return shown((await client.send(new DescribeBundleTasksCommand(input))).BundleTasks[0]);
  },
  async cancel(id) {
    return shown((await client.send(new CancelBundleTaskCommand({ BundleId: id }))).BundleTask);
  },
  version: async () => ({ version: require("@aws-sdk/client-ec2/package.json").version }),
};

actions[action](...rest)
  .catch((error) => {
    if (!(error instanceof EC2ServiceException)) throw error;
    return { error: error.name };
  })
  .then((answer) => console.log(JSON.stringify(answer)));
