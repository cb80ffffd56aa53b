-- The contract is as before, but for a window that is not counted in UTC: it ends when that is recorded, and its zone is told.
CREATE OR REPLACE FUNCTION engine_unaffordable_v2(p_tenant uuid, p_entry jsonb, p_starts timestamptz) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_period text := COALESCE(p_entry ->> 'period', 'total');
    v_name   text := CASE WHEN v_period = 'total' THEN p_entry ->> 'scope_kind'
                          ELSE format('%s''s %s', p_entry ->> 'scope_kind', v_period) END;
    v_unit   text := p_entry ->> 'unit';
    v_rule   text := concat_ws('.', CASE WHEN p_entry ? 'limit' THEN 'limits' ELSE 'budgets' END,
        p_entry ->> 'scope_kind', p_entry ->> 'period', p_entry ->> 'unit');
    v_limit  jsonb := jsonb_strip_nulls(jsonb_build_object('scope', p_entry -> 'scope_kind',
        'scope_id', p_entry -> 'scope_id', 'subject', p_entry -> 'subject', 'unit', v_unit, 'period', v_period));
    v_budget budgets;
BEGIN
    SELECT * INTO v_budget FROM budgets
        WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind'
          AND scope_id = (p_entry ->> 'scope_id')::uuid AND unit = v_unit AND period = v_period AND starts_at = p_starts;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('outcome', 'deny', 'reason', 'budget_missing', 'limit', v_limit, 'rule', v_rule,
            'message', format('no %s budget in %s is set for this %s', v_name, v_unit, p_entry ->> 'scope_kind'),
            'unblock', format('a %s budget in %s', v_name, v_unit));
    END IF;
    v_limit := v_limit || jsonb_build_object('limit', trim_scale(v_budget.limit_amount)::text,
        'spent', trim_scale(v_budget.spent)::text, 'reserved', trim_scale(v_budget.reserved)::text,
        'needed', trim_scale((p_entry ->> 'amount')::numeric)::text);
    IF v_period <> 'total' THEN
        v_limit := v_limit || jsonb_build_object('time_zone', v_budget.time_zone, 'ends_at', COALESCE(v_budget.ends_at,
            (p_starts AT TIME ZONE 'UTC' + ('1 ' || v_period)::interval) AT TIME ZONE 'UTC'));
    END IF;
    RETURN jsonb_strip_nulls(jsonb_build_object('outcome', 'deny', 'reason', 'budget_exceeded', 'limit', v_limit,
        'rule', v_rule, 'message', format('the %s budget is too small: limit %s %s, spent %s, reserved %s, needed %s', v_name,
            v_limit ->> 'limit', v_unit, v_limit ->> 'spent', v_limit ->> 'reserved', v_limit ->> 'needed'),
        'unblock', format('a higher %s budget in %s', v_name, v_unit)
            || COALESCE(', or waiting until ' || (v_limit ->> 'ends_at'), '')));
END
$$;
