// The AWS SDK for JavaScript, version 2, driven as clients/driving.py says.
const AWS = require("aws-sdk");

const [action, endpoint, ...rest] = process.argv.slice(2);
const ec2 = new AWS.EC2({ endpoint, region: process.env.AWS_DEFAULT_REGION, maxRetries: 0 });
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
    return shown((await ec2.bundleInstance(input).promise()).BundleTask);
  },
  "dry-run": (...given) => actions.bundle(...given, true),
  async describe(prefix) {
    const input = { Filters: [{ Name: "s3-prefix", Values: [prefix] }] };
    return { tasks: (await ec2.describeBundleTasks(input).promise()).BundleTasks.map(shown) };
  },
  async wait(id) {
    const input = { BundleIds: [id], $waiter: { delay: 1, maxAttempts: 60 } };
    return shown((await ec2.waitFor("bundleTaskComplete", input).promise()).BundleTasks[0]);
  },
  async cancel(id) {
    return shown((await ec2.cancelBundleTask({ BundleId: id }).promise()).BundleTask);
  },
  version: async () => ({ version: AWS.VERSION }),
};

actions[action](...rest)
  .catch((error) => {
    if (!error.requestId) throw error;
    return { error: error.code };
  })
  .then((answer) => console.log(JSON.stringify(answer)));
